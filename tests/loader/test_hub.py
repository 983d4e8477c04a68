"""Names of models: a local folder without any network, a Hub id, or a named error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from milpy import hub
from milpy.errors import HubError


@pytest.fixture
def no_network(monkeypatch):
    def refuse(repo_id, revision):
        raise AssertionError(f"a look-up on the Hub: {repo_id}")

    monkeypatch.setattr(hub, "_download", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_local_folder_is_used_as_it_is(tmp_path, monkeypatch):
    assert hub.resolve_model(tmp_path) == tmp_path
    assert hub.resolve_model(str(tmp_path)) == tmp_path
    # A relative path that would also be a Hub id.
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve_model("~/org") == tmp_path / "org"


@pytest.mark.usefixtures("no_network")
def test_local_mistakes_are_named_without_a_look_up(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for name, reason in [
        (file, "is a file, expected a folder"),
        (tmp_path / "none", "no such folder"),
        (str(tmp_path / "none"), "no such folder"),
        ("./none", "no such folder"),
        ("../none", "no such folder"),
        ("a/b/c", "no such folder"),
        ("", "model name is empty"),
        ("org/name\n", "no such folder"),
        ("https://example.com/x", "no such folder"),
        (Path("org/name"), "no such folder"),
    ]:
        with pytest.raises(HubError, match=reason):
            hub.resolve_model(name)
    with pytest.raises(HubError, match="expected no revision"):
        hub.resolve_model(tmp_path, revision="main")


def test_an_id_asks_for_safetensors_json_and_tokenizer_files_only(tmp_path, monkeypatch):
    import huggingface_hub  # noqa: PLC0415
    from huggingface_hub.utils import filter_repo_objects  # noqa: PLC0415

    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve_model("org/name", revision="abc") == tmp_path
    assert (asked["repo_id"], asked["revision"]) == ("org/name", "abc")
    wanted = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    others = [
        "pytorch_model.bin", "modeling.py", "consolidated.00.pth", "README.md", "model.gguf",
        "original/params.json", "onnx/model.safetensors", "tf_model.h5", "training_args.bin",
    ]  # fmt: skip
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + others, **patterns)) == wanted


@pytest.mark.parametrize(
    ("error", "named"),
    [
        ("RepositoryNotFoundError", "no such repository on the Hub"),
        ("GatedRepoError", "gated on the Hub"),
        ("RevisionNotFoundError", "the Hub has no revision 'abc'"),
        ("LocalEntryNotFoundError", "the Hub is offline"),
        ("OfflineModeIsEnabled", "download from the Hub failed"),
    ],
)
def test_failures_of_the_hub_are_named(monkeypatch, error, named):
    import huggingface_hub  # noqa: PLC0415
    from huggingface_hub import errors  # noqa: PLC0415

    kind = getattr(errors, error)

    def snapshot_download(repo_id, **options):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(HubError, match=named) as info:
        hub.resolve_model("org/name", revision="abc")
    assert str(info.value).startswith("org/name: ")


def test_an_id_is_refused_offline(tmp_path):
    """HF_HUB_OFFLINE is read when huggingface_hub is imported, so this needs a process."""
    code = "from milpy.hub import resolve_model; resolve_model('org/no-such-model')"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(hub.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "milpy.errors.HubError: org/no-such-model: no such folder, its main revision is not in the "
        "Hub's cache, and the Hub is offline"
    )


def test_importing_the_module_does_not_import_huggingface_hub():
    code = "import sys, milpy.hub; sys.exit('huggingface_hub' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(hub.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
