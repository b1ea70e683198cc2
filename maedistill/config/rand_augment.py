"""timm's notation of RandAugment, for the rule of `augment.rand_augment`."""

import re

# Magnitude m, its ceiling mmax and deviation mstd, n operations per image, each with probability p; inc1: operations
# whose strength grows with the magnitude; tweights: timm's weights of its 15 operations, of which n are then drawn
# without replacement. timm silently ignores a section that it does not know, e.g. `inc` without its number. Its sets
# t3a and t3aw are excluded: they are 3-Augment, which is incomplete without colour jitter.
_MANY = r"(?=.*-tweights).*-n0*(1[6-9]|[2-9]\d|[1-9]\d\d)"
NOTATION = re.compile(rf"rand(?!{_MANY})(-((m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?|tweights))*")  # of the whole text
