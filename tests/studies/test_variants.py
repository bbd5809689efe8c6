"""Runs over several seeds side by side: what stands in the table is what its words say."""

import json

import pytest

from docs.studies import results, variants


def run_file(folder, method, seed, curve, accuracy):
    content = {
        "command": f"python -m jobs.train method={method} seed={seed}", "code": "0.1.0", "method": method.split()[0],
        "seed": seed, "curve": [[step, value, 0.01] for step, value in curve],
        "results": [{"way": 5, "shot": 1, "accuracy": accuracy, "interval": 0.01}],
    }  # fmt: skip
    (folder / f"{method.split()[0]}_{seed}.json").write_text(json.dumps(content))


def test_variants_are_compared_seed_by_seed(tmp_path, monkeypatch):
    folder = tmp_path / "variants_cifar_fs"
    folder.mkdir()
    run_file(folder, "nca", 0, [(100, 0.30), (200, 0.42)], 0.40)
    run_file(folder, "nca", 1, [(100, 0.33), (200, 0.31)], 0.44)
    run_file(folder, "triplet method.margin=1", 0, [(100, 0.43), (200, 0.50)], 0.45)
    run_file(folder, "triplet method.margin=1", 1, [(100, 0.20), (200, 0.40)], 0.47)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    text = results.render("variants_cifar_fs")
    t = 12.706  # 0.975 quantile of Student's t with one degree of freedom
    assert f"| nca | 42.00 ± {t * 2:.2f} | 42.0; 33.0 | 200; 100 | 200; 100 |" in text
    difference = f"+4.00 ({4 - t:+.2f} to {4 + t:+.2f})"
    assert f"| triplet, margin=1 | 46.00 ± {t * 1:.2f}; {difference} | 50.0; 40.0 | 100; 200 | 100; 200 |" in text
    assert "| steps to 37.8; 29.7 % | steps to 42.0; 33.0 % |" in text
    assert "- `python -m jobs.train method=nca seed=1` (0.1.0)" in text


def test_a_variant_that_lacks_a_seed_is_refused(tmp_path):
    run_file(tmp_path, "nca", 0, [(100, 0.3)], 0.4)
    run_file(tmp_path, "nca", 1, [(100, 0.3)], 0.4)
    run_file(tmp_path, "triplet", 0, [(100, 0.3)], 0.4)
    with pytest.raises(ValueError, match="with the same seeds"):
        variants.markdown(sorted(tmp_path.glob("*.json")))
