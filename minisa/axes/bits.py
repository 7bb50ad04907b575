"""A cache in int8: each number takes one byte, and each token and head two more, for a scale.

For the d numbers x of a token's key or value in one head (symmetric quantization, as LLM.int8(),
arXiv:2208.07339, does for activations):

    scale = max |x_i| / 127         stored in bfloat16
    n_i = round(x_i / scale)        from -127 to 127, stored in int8; read as n_i · scale

n_i is computed with the scale as it is stored, so rounding the scale costs next to nothing. A head
of d numbers takes d + 2 bytes, where bfloat16 takes 2·d and float32 4·d.

Attention needs floats, so each step converts all visible numbers of a layer, once; the other layers
of its span get the floats. While a prompt is read, attention sees the floats from before rounding:
they are rounded when the whole prompt has been read.
"""

import torch
from torch.nn import functional as F

def quantize(x):
    """x (..., d) → int8 numbers (..., d), and their scales (..., 1), or (..., 0) if d is 0."""
    x = x.float()
    largest = x.abs().topk(min(1, x.size(-1))).values
    scales = (largest / 127).clamp(min=1e-30).bfloat16()
    numbers = (x / scales).round().clamp(-127, 127)         # a scale may be rounded down
    return numbers.to(torch.int8), scales

class Int8:
    """A storage; its methods are those of Floats in squeeze.py."""
    bits = 8

    def __init__(self, tokens, room):
        free = 0, 0, 0, room - tokens.size(2)
        numbers, scales = quantize(tokens)
        self.numbers = F.pad(numbers, free)                 # (B, G, room, d)
        self.scales = F.pad(scales, free)                   # (B, G, room, 1)
        self.tensors = [self.numbers, self.scales]
        self.dtype = tokens.dtype

    @staticmethod
    def bytes_per_token(n, heads):
        return n + 2 * heads if n else 0

    def put(self, sequences, places, new):
        numbers, scales = quantize(new)
        self.numbers[sequences, :, places] = numbers
        self.scales[sequences, :, places] = scales

    def first(self, count):
        numbers = self.numbers[:, :, :count].to(self.dtype)
        scales = self.scales[:, :, :count].to(self.dtype)
        return numbers * scales
