"""AdapterPublisher with the real huggingface_hub against the emulator, read back by peft."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from spider_sdk.config.model import HubConfig, JobConfig, OutputConfig
from spider_sdk.errors import AuthError, FatalJobError, NotSupported, PipelineError
from spider_worker.sinks.adapter import AdapterPublisher
from spider_worker.sinks.adapter_card import adapter_card
from spider_worker.sinks.hub_repo import ATTEMPTS, HubRepo
from tests.support.hub_emulator import READ_TOKEN, WRITE_TOKEN, HubEmulator
from tests.support.trackers import on_policy_job

FACTS = {"steps": 20, "final": {"kl": 0.5}, "checkpoints": [10, 20]}


def job_for(repo_id: str, **hub: Any) -> JobConfig:
    config = HubConfig(**{"repo_id": repo_id, "repo_type": "model", **hub})
    return on_policy_job(OutputConfig("upload_hf", hf=config))


@dataclasses.dataclass
class Run:
    """A run that has an adapter to publish. A new publisher is made for each call, as by a fleet
    whose finalising is tried again anywhere."""

    hub: HubEmulator
    repo_id: str
    folder: Path
    waits: list[float] = dataclasses.field(default_factory=list)

    def publisher(self, **more: Any) -> AdapterPublisher:
        token = more.pop("token", WRITE_TOKEN)
        return AdapterPublisher(
            job_for(self.repo_id, **more),
            token=token,
            work_dir=self.folder / "work",
            endpoint=self.hub.endpoint,
            sleep=self.waits.append,
        )

    def files(
        self, steps: Sequence[int] = (10, 20), weights: bytes = b"w" * 400
    ) -> dict[str, Path]:
        contents = {
            "README.md": adapter_card(job_for(self.repo_id), FACTS).encode(),
            "adapter_config.json": b'{"peft_type": "LORA"}',
            "adapter_model.safetensors": weights,
            "metrics.jsonl": b'{"step": 20}\n',
        }
        for step in steps:
            contents[f"checkpoints/step-{step:06d}/adapter_config.json"] = b"{}"
            contents[f"checkpoints/step-{step:06d}/adapter_model.safetensors"] = b"%d" % step
        found = {}
        for name, content in contents.items():
            found[name] = self.folder / "files" / name
            found[name].parent.mkdir(parents=True, exist_ok=True)
            found[name].write_bytes(content)
        return found

    def push(self, files: dict[str, Path] | None = None) -> str:
        return self.publisher().push(self.files() if files is None else files, "20 steps")

    @property
    def there(self) -> dict[str, bytes]:
        files = self.hub.repo(self.repo_id, "model").files
        return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}

    @property
    def commits(self) -> int:
        return len(self.hub.repo(self.repo_id, "model").commits) - 1


@pytest.fixture
def run(hub: HubEmulator, repo_id: str, tmp_path: Path) -> Run:
    run = Run(hub, repo_id, tmp_path)
    run.publisher().check_access()
    return run


@pytest.fixture
def api(hub: HubEmulator) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


# The right to write ------------------------------------------------------------------


def test_checking_makes_a_model_repository_and_commits_nothing(run: Run) -> None:
    run.publisher().check_access()
    assert run.hub.repo(run.repo_id, "model").type == "model"
    assert run.commits == 0
    with pytest.raises(LookupError):
        run.hub.repo(run.repo_id, "dataset")


@pytest.mark.parametrize(
    ("token", "said"),
    [(None, "no HF_TOKEN"), ("hf_unknown", "does not accept HF_TOKEN"), (READ_TOKEN, "no right")],
)
def test_a_token_that_will_not_do(
    hub: HubEmulator, repo_id: str, tmp_path: Path, token: str | None, said: str
) -> None:
    with pytest.raises(AuthError, match=said):
        Run(hub, repo_id, tmp_path).publisher(token=token).check_access()


def test_a_private_adapter(hub: HubEmulator, repo_id: str, tmp_path: Path, run: Run) -> None:
    with pytest.raises(FatalJobError, match=r"model .* is public"):
        run.publisher(private=True).check_access()
    hidden = Run(hub, f"{repo_id}-hidden", tmp_path)
    hidden.publisher(private=True).check_access()
    assert hub.repo(hidden.repo_id, "model").private


def test_a_card_that_could_not_be_kept_is_found_before_the_first_step(run: Run) -> None:
    content = base64.b64encode(b"---\n- a list\n---\n").decode()
    line = {"content": content, "path": "README.md", "encoding": "base64"}
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "file", "value": line}]
    run.hub.repo(run.repo_id, "model").commit(lines, "alice")  # as git would push it
    with pytest.raises(FatalJobError, match=r"README\.md of the output model"):
        run.publisher().check_access()


@pytest.mark.parametrize(
    ("hub_section", "error", "said"),
    [
        ({"repo_type": "dataset"}, NotSupported, "repo_type: model"),
        ({"config_name": "a"}, NotSupported, "config_name"),
        ({"repo_id": "no-namespace"}, FatalJobError, "namespace/name"),
    ],
)
def test_outputs_that_cannot_be_honoured_are_refused_by_name(
    tmp_path: Path, hub_section: dict[str, Any], error: type[Exception], said: str
) -> None:
    job = job_for(**{"repo_id": "a/b", **hub_section})
    with pytest.raises(error, match=said):
        AdapterPublisher(job, token="hf_x", work_dir=tmp_path)
    with pytest.raises(FatalJobError, match=r"output\.hf"):
        AdapterPublisher(on_policy_job(), token="hf_x", work_dir=tmp_path)


# What is pushed ----------------------------------------------------------------------


def test_everything_goes_in_one_commit(run: Run, api: HfApi) -> None:
    files = run.files()
    assert run.push(files) == f"{run.hub.endpoint}/{run.repo_id}"
    assert run.commits == 1
    assert run.there == {name: path.read_bytes() for name, path in files.items()}
    repo = run.hub.repo(run.repo_id, "model")
    assert repo.head.title == "20 steps"
    assert repo.files["adapter_model.safetensors"].lfs
    card = ModelCard(run.there["README.md"].decode())
    assert card.data.base_model == "org/student"


def test_the_card_is_valid_for_the_hub(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.push()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", run.hub.endpoint)
    ModelCard(run.there["README.md"].decode()).validate(repo_type="model")
    assert run.hub.count("validate_yaml") >= 1


def test_a_second_push_commits_what_changed_and_nothing_else(run: Run) -> None:
    run.push()
    uploads = run.hub.count("lfs_upload")
    asked = run.hub.count("preupload")
    run.push()
    assert run.commits == 1
    assert run.hub.count("preupload") == asked  # nothing was so much as offered
    run.push(run.files(weights=b"v" * 400))
    assert run.commits == 2
    assert run.there["adapter_model.safetensors"] == b"v" * 400
    # The one large file that changed, and the small ones not at all.
    assert run.hub.count("lfs_upload") == uploads + 1


def test_a_small_file_of_the_same_size_is_told_apart(run: Run) -> None:
    run.push()
    files = run.files()
    files["adapter_config.json"].write_bytes(b'{"peft_type": "LoHA"}')
    run.push(files)
    assert run.commits == 2
    assert run.there["adapter_config.json"] == b'{"peft_type": "LoHA"}'


def test_what_an_earlier_run_left_goes_and_what_is_not_ours_stays(run: Run, api: HfApi) -> None:
    run.push(run.files(steps=(10, 20, 30)))
    foreign = ["LICENSE", "checkpoints/notes.txt", "model.safetensors", "data/adapter_config.json"]
    additions = [CommitOperationAdd(name, b"mine") for name in foreign]
    api.create_commit(run.repo_id, additions, commit_message="mine")
    shutil.rmtree(run.folder / "files")
    run.push(run.files(steps=(20,)))
    kept = {name.split("/")[1] for name in run.there if name.startswith("checkpoints/step")}
    assert kept == {"step-000020"}
    assert set(foreign) <= set(run.there)


def test_a_users_words_in_the_card_survive(run: Run, api: HfApi) -> None:
    run.push()
    text = run.there["README.md"].decode().replace("---\n", "---\nlicense: mit\n", 1)
    card = CommitOperationAdd("README.md", f"{text}\n## Thanks\n".encode())
    api.create_commit(run.repo_id, [card], commit_message="mine")
    run.push(run.files(weights=b"v" * 400))
    after = run.there["README.md"].decode()
    assert ModelCard(after).data.license == "mit"
    assert "## Thanks" in after
    assert after.count("## Recipe") == 1


# Faults ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "cut_after", "status", "status_after"])
def test_a_commit_of_unknown_fate_is_settled_once(run: Run, kind: str) -> None:
    run.hub.fault("commit", kind, status=503)
    run.push()
    assert run.commits == 1
    assert set(run.there) == set(run.files())


def test_a_push_that_was_killed_is_repeated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException): ...

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(HubRepo, "commit", killed)
        with pytest.raises(Killed):
            run.push()
    assert run.commits == 0
    run.push()
    assert run.commits == 1


def test_a_foreign_commit_in_between_is_built_upon(
    run: Run, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = HubRepo.upload

    def interrupted(self: HubRepo, additions: Sequence[CommitOperationAdd]) -> None:
        upload(self, additions)
        if run.commits == 0:
            note = CommitOperationAdd("NOTES.md", b"mine")
            api.create_commit(run.repo_id, [note], commit_message="mine")

    monkeypatch.setattr(HubRepo, "upload", interrupted)
    run.push()
    assert run.commits == 2
    assert {"NOTES.md", "adapter_config.json"} <= set(run.there)


def test_a_hub_that_never_settles(run: Run) -> None:
    run.hub.fault("commit", "status", times=100, status=503)
    with pytest.raises(PipelineError, match=f"{ATTEMPTS} commits"):
        run.push()
    assert len(run.waits) == ATTEMPTS - 1


# Reading it back ---------------------------------------------------------------------

LOAD = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, repo = sys.argv[1:3]
answers = []
for where in ({}, {"subfolder": "checkpoints/step-000010"}):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, repo, **where)
    with torch.no_grad():
        answers.append(model(torch.tensor([[5, 9, 30, 41]])).logits[0, -1, :8].tolist())
print(json.dumps(answers))
"""


def test_the_adapter_and_its_checkpoints_load_with_peft(
    run: Run, make_adapter: Callable[[float], Path], tiny_model: Path
) -> None:
    """In a process of its own, as its user would: HF_ENDPOINT is read on import."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    last, early = make_adapter(1.0), make_adapter(0.25)
    files = run.files(steps=())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        files[name] = last / name
        files[f"checkpoints/step-000010/{name}"] = early / name
    run.push(files)
    expected = []
    for folder in (last, early):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder)
        with torch.no_grad():
            expected.append(model(torch.tensor([[5, 9, 30, 41]])).logits[0, -1, :8].tolist())
    env = {
        **os.environ,
        "HF_ENDPOINT": run.hub.endpoint,
        "HF_HOME": str(run.folder / "home"),
        "HF_TOKEN": WRITE_TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        env.pop(name, None)
    command = [sys.executable, "-c", LOAD, str(tiny_model), run.repo_id]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == expected
    assert found[0] != found[1]


@pytest.fixture
def make_adapter(tmp_path: Path, tiny_model: Path) -> Callable[[float], Path]:
    """Makes a LoRA adapter on the tiny model, which moves it by so much."""

    def make(scale: float) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "lora_B" in name:
                    tensor.copy_(scale * torch.randn_like(tensor))
        folder = tmp_path / f"adapter-{scale}"
        model.save_pretrained(folder)
        return folder

    return make
