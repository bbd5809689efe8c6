from __future__ import annotations

from pipeline.methods.imprinted import blend

CASES = "adaptive_proxy*.npz"


def test_blending(case, check):
    old, proxies, rate = case["in_old_weights"], case["in_proxies_raw"], float(case["in_alpha"])
    check(blend(old, proxies, rate), "out_updated_weights")
    check(blend(old.expand(4, -1, -1), proxies.expand(4, -1, -1), rate)[2], "out_updated_weights")
    check(blend(old[:1], proxies[:1], 1.0)[0], "out_new_class_weight_from_row0")
