"""Packed weights: frozen dataclasses with pack, unpack, and validated canonical tensors.

`pack` takes a dense [N, K] on any device; `unpack` gives it back as stored. K and N need not be multiples of
anything: the last group, quad or word may be short.
"""

from llmkern.formats._base import PackedWeight
from llmkern.formats.bitmask import BitmaskWeight
from llmkern.formats.int4 import Int4Weight
from llmkern.formats.int8 import Int8Weight
from llmkern.formats.sparse24 import Sparse24Int4Weight, Sparse24Weight

__all__ = ["BitmaskWeight", "Int4Weight", "Int8Weight", "PackedWeight", "Sparse24Int4Weight", "Sparse24Weight"]
