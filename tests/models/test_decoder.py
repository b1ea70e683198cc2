"""The decoders: only what is asked is computed, and nothing else changes; and which patches each prediction reads."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maedistill.models.blocks import TransformerBlock
from maedistill.models.decoder import CrossDecoder, TokenDecoder
from maedistill.models.initialize import initialize
from maedistill.models.masking import PatchSplit, random_split

SHAPE = {"width": 32, "depth": 2, "num_heads": 4, "grid": 6, "patch_size": 4, "num_prefix": 1}


def build(kind: type[TokenDecoder]) -> tuple[TokenDecoder, torch.Tensor, PatchSplit]:
    """A decoder with weights far from its initial ones, tokens of 9 visible patches, and a split of 36."""
    decoder = kind(24, **SHAPE)
    initialize(decoder, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tokens = torch.randn(3, 1 + 9, 24, generator=generator)
    return decoder, tokens, random_split(torch.arange(3), seed=0, num_patches=36, num_student=9, num_teacher=9)


@pytest.mark.parametrize("first", [1, 7, 19])
def test_a_block_that_returns_some_rows_is_timms_block(first: int) -> None:
    ours, generator = TransformerBlock(32, 4), torch.Generator().manual_seed(0)
    timms = Block(32, 4, mlp_ratio=4.0, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    for parameter in ours.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(2, 20, 32, generator=generator)
    torch.testing.assert_close(ours(x), timms(x), rtol=0, atol=0)
    given = [x.clone().requires_grad_() for _ in range(2)]
    expected, found = timms(given[0])[:, first:], ours(given[1], first=first)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape, generator=generator)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(ours.named_parameters(), timms.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_hidden_rows_are_those_of_a_decoder_that_computes_all() -> None:
    decoder, tokens, split = build(TokenDecoder)
    everything = decoder.head(decoder.norm(decoder.rows(tokens, split)))  # [B, P + N, p*p*3]
    torch.testing.assert_close(decoder(tokens, split), everything[:, 1 + 9 :], rtol=1e-5, atol=1e-5)


def test_rows_that_nobody_reads_cost_nothing() -> None:
    decoder, tokens, split = build(TokenDecoder)
    counts = {}
    for first in (0, 10):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # torch counts no other of a CPU
            decoder.rows(tokens, split, first=first)
        counts[first] = counter.get_total_flops()
    width, rows = 32, 10
    spared = 3 * rows * (2 * 9 * width**2 + 4 * (1 + 36) * width)  # projection and MLP; scores and their sum
    assert counts[0] - counts[10] == spared


def test_the_cross_decoder_costs_what_its_formula_says() -> None:
    decoder, tokens, split = build(CrossDecoder)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(tokens, split, split.hidden[:, :5])
    images, asked, known, width = 3, 5, 10, 32
    block = 2 * asked * (1 + 1 + 8) * width**2 + 2 * known * 2 * width**2 + 4 * asked * known * width
    ends = 2 * known * 24 * width + 2 * asked * width * 48
    assert counter.get_total_flops() == images * (2 * block + ends)


@pytest.mark.parametrize("kind", [TokenDecoder, CrossDecoder])
def test_rows_keep_to_their_patches(kind: type[TokenDecoder]) -> None:
    """Asked in another order, the predictions come in that order; another visible order changes nothing."""
    decoder, tokens, split = build(kind)
    expected = decoder(tokens, split)
    torch.testing.assert_close(decoder(tokens, split, split.hidden.flip(1)), expected.flip(1), rtol=1e-4, atol=1e-5)
    order = torch.cat([split.student.flip(1), split.hidden], dim=1)
    mirrored = torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], dim=1)
    torch.testing.assert_close(decoder(mirrored, PatchSplit(order, 9, 9)), expected, rtol=1e-4, atol=1e-5)


def test_in_the_cross_decoder_hidden_patches_do_not_see_each_other() -> None:
    for kind, alone in ((CrossDecoder, True), (TokenDecoder, False)):
        decoder, tokens, split = build(kind)
        together = decoder(tokens, split)
        few = decoder(tokens, split, split.hidden[:, 3:8])
        assert torch.allclose(few, together[:, 3:8], rtol=1e-5, atol=1e-5) is alone
        other = tokens.clone()
        other[:, 4] += 1.0
        assert not torch.isclose(decoder(other, split), together).all(2).any(), "every prediction reads what is visible"


def test_cross_attention_is_the_textbooks() -> None:
    """One block, one image, head by head, in float64."""
    decoder, tokens, split = build(CrossDecoder)
    decoder, tokens = decoder.double(), tokens.double()
    block, (known, rows) = decoder.blocks[0], decoder.inputs(tokens, split, split.hidden)
    context, q = block.norm_context(known[0]), block.query(block.norm1(rows[0]))
    k, v = block.key_value(context).chunk(2, dim=1)
    read = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        read.append((q[:, part] @ k[:, part].T / 8**0.5).softmax(1) @ v[:, part])
    x = rows[0] + block.proj(torch.cat(read, dim=1))
    torch.testing.assert_close(block(rows, known)[0], x + block.mlp(block.norm2(x)))
