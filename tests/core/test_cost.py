"""Predictions against what a model really has, stores and multiplies."""

import itertools

import pytest
import torch

from minisa.cost import measure, predict
from minisa.model import GPT, GPTConfig, KVCache

SHARING = [("", "weights"), ("1-3", "weights"), ("1-3", "kv"), ("0-1,2-3", "weights"), ("0-1,2-3", "kv")]
CASES = [*itertools.product(SHARING, (4, 2, 1), (1, 77, 600), (1, 3))]

@pytest.mark.parametrize("sharing, n_kv_head, context, batch_size", CASES)
def test_predictions_equal_measurements(sharing, n_kv_head, context, batch_size):
    config = GPTConfig(block_size=600, vocab_size=300, n_layer=4, n_head=4, n_kv_head=n_kv_head, n_embd=32,
                       share=sharing[0], share_kind=sharing[1], tied=context != 77)
    model = GPT(config).eval()
    measured = measure(model, context, batch_size)
    assert predict(config, context, batch_size) == measured == predict(model, context, batch_size)

def test_the_bill_of_a_small_model_by_hand():
    # 2 layers, C = 8, H = G = 2, D = 4, M = 16, V = 10; at context 5, layer 1 reuses layer 0's weights
    config = GPTConfig(block_size=5, vocab_size=10, n_layer=2, n_head=2, n_embd=8, n_hidden=16, share="0-1")
    c = predict(config, context=5)
    q = k = v = out = 2 * 8 * 8
    scores = weighted_sum = 2 * 8 * 5
    mlp, head = 6 * 8 * 16, 2 * 8 * 10
    anchor, reuse = q + k + v + scores + weighted_sum + out + mlp, v + weighted_sum + out + mlp
    assert c.decode_flops == anchor + reuse + head
    assert c.cache_bytes_per_token == (8 + 8 + 8) * 4 and c.cache_bytes == 5 * 96
    assert c.params == 10 * 8 + (3 * 64 + 64 + 3 * 128) + (64 + 64 + 3 * 128) + 8

def test_shared_attention_saves_half_the_cache_of_a_reuse_layer_and_cla_all_of_it():
    def per_token(**mode):
        return predict(GPTConfig(n_layer=8, **mode), 1).cache_bytes_per_token
    layer = per_token() // 8
    assert per_token(share="1-6") == 8 * layer - 5 * layer // 2
    assert per_token(share="1-6", share_kind="kv") == 8 * layer - 5 * layer

def test_bytes_are_those_of_the_numbers_stored():
    config = GPTConfig(block_size=64, share="1-3")
    stored = KVCache(GPT(config).bfloat16(), 2, 64).nbytes
    assert predict(config, 64, 2, bytes_per_number=2).cache_bytes == stored

def test_measuring_counts_what_is_really_multiplied():
    config = GPTConfig(block_size=64, vocab_size=300, n_embd=32)

    class OneProductMore(GPT):                          # which the formula knows nothing of
        def hidden(self, idx, cache):
            return super().hidden(idx, cache) @ torch.eye(32)

    measured = measure(OneProductMore(config).eval(), 64)
    assert measured.decode_flops == predict(config, 64).decode_flops + 2 * 32 * 32

@pytest.mark.parametrize("context", [0, 257])
def test_a_context_outside_the_model_is_refused(context):
    with pytest.raises(ValueError, match=f"--context={context}"):
        predict(GPTConfig(block_size=256), context)
