"""The streams of draws. The hash itself is tested with the masks that it makes."""

from maedistill.randomness import Stream


def test_streams_keep_their_numbers():
    """They are hashed into every draw: a run could not be continued by a version that numbers them otherwise."""
    names = ["ORDER", "CROP", "FLIP", "MASK", "REPLACEMENT", "SHARDS", "NETWORK", "SUBSET", "AUGMENT"]
    assert [Stream[name].value for name in names] == list(range(1, 10))
    assert len({stream.value for stream in Stream.__members__.values()}) == len(Stream.__members__)
