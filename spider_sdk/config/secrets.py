"""Secrets of a job: which it needs, and how they leave its document.

A job's document is stored and shown; its secrets travel beside it, in ``env``. Where a document
holds a key in clear, the key moves to ``env`` and the document keeps the variable's name
(``api_key_env``). A secret where no reference can stand for it is refused.
"""

from __future__ import annotations

__all__ = [
    "lift_secrets",
    "optional_secrets",
    "required_secrets",
    "strip_secrets",
    "without_plain",
]

from collections.abc import Iterator, Mapping
from typing import Any, Final

from spider_sdk.config.llm_keys import PLAIN_VARIABLES, likely_keys, likely_variables
from spider_sdk.config.loader import parse_job
from spider_sdk.config.model import Job, JobConfig, ModelConfig, SweConfig, TeacherConfig
from spider_sdk.config.names import (
    GENERATED,
    env_name_problem,
    is_secret_key,
    maybe_secret_key,
)
from spider_sdk.config.plain import as_json
from spider_sdk.config.positions import Path, dotted
from spider_sdk.config.services import BASE_URL, student_service, teacher_service, usual_key
from spider_sdk.errors import ConfigError, Problem

_PLAIN: Final = PLAIN_VARIABLES | frozenset(
    {"TRACKIO_SPACE_ID", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"}
)
"""Variables that travel with the secrets and hide nothing: to blank out every ``offline`` in what
a job says would help nobody."""

#: The key, and where it is meant for: a key that went to another server than its own would be
#: given away.
_TRACKER: Final[Mapping[str, tuple[str, ...]]] = {
    "wandb": ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"),
    "trackio": ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID", "TRACKIO_WRITE_TOKEN"),
}
_HUB: Final = "HF_TOKEN"
_TOKEN_OPTION: Final[Path] = ("source", "options", "token")
_CODE: Final = ("pre_processor", "post_processor", "evaluator", "tools")
_OPTIONS: Final[Path] = ("generation", "on_policy_options")


def without_plain(secrets: Mapping[str, str]) -> dict[str, str]:
    """Those of a job's secrets that hide something."""
    return {name: value for name, value in secrets.items() if name not in _PLAIN}


def required_secrets(job: Job) -> tuple[str, ...]:
    """Variables without which the job cannot run, sorted."""
    return tuple(sorted(_required(job)))


def optional_secrets(job: Job) -> tuple[str, ...]:
    """Variables that the job uses where they are set, sorted; none of the required ones."""
    return tuple(sorted(_optional(job) - _required(job)))


def _required(job: Job) -> set[str]:
    if isinstance(job, SweConfig):
        names = {job.llm_api_key_env} if not job.llm_api_key else set()
        if job.hf_repo_id:
            names.add(_HUB)
        return {name for name in names if name}
    names = {_HUB} if job.output.mode == "upload_hf" else set()
    names.update(_key_name(service) for service in _services(job))
    if not job.model.api_key:
        names.add(job.model.api_key_env)  # even where on_policy_options has another: it was named
    return {name for name in names if name}


def _services(job: JobConfig) -> list[ModelConfig | TeacherConfig]:
    """The student's and the teachers'."""
    options = job.generation.on_policy_options
    teachers = options.teacher if options is not None else ()
    return [student_service(job), *(teacher_service(job, one) for one in teachers)]


def _key_name(service: ModelConfig | TeacherConfig) -> str | None:
    if service.api_key:
        return None
    return service.api_key_env or usual_key(service.provider or "", service.base_url)


def _optional(job: Job) -> set[str]:
    names = {_HUB}  # gated models and data sets
    if isinstance(job, SweConfig):
        named = bool(job.llm_api_key or job.llm_api_key_env)
        if not named:
            names.update(likely_keys(job.llm_model, job.llm_base_url))
        names.update(likely_variables(job.llm_model, job.llm_base_url, key_named=named))
        return names
    options = job.generation.on_policy_options
    if options is not None and options.wandb_project:
        names.update(_TRACKER[options.tracker])
    for service in _services(job):
        if service.provider in BASE_URL and not service.base_url:
            names.add(BASE_URL[service.provider])
    return names


def lift_secrets(
    document: Mapping[str, Any],
    environ: Mapping[str, str],
    interpolated: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """Part a job's wire document from its secrets: ``(document, env, names)``.

    ``env`` holds the secrets that stood in the document and, from ``environ``, those that the
    job needs or can use; ``names`` are its names, sorted, for printing. A secret takes the name
    in its ``api_key_env``, else that of the variable it was interpolated from
    (``AppConfig.interpolated``), else one made up from its place. The value in the document goes
    before the one in ``environ``. Raises ConfigError for a document that is not valid, for a
    secret that no reference can stand for, and for a variable that the job needs and that is not
    set.
    """
    clean, env = _part(document, environ, interpolated or {})
    job = parse_job(clean)
    problems = []
    unneeded = _own_servers(job, environ)
    for name in required_secrets(job):
        if name not in env and not environ.get(name):
            if name in unneeded:
                continue
            said = f"the job needs the environment variable {name}, which is not set; export it"
            problems.append(Problem(f"env.{name}", f"{said}{_reason(name, job)}"))
        env.setdefault(name, environ.get(name, ""))
    if problems:
        raise ConfigError(problems)
    for name in optional_secrets(job):
        if environ.get(name):
            env.setdefault(name, environ[name])
    return clean, env, tuple(sorted(env))


def _own_servers(job: Job, environ: Mapping[str, str]) -> set[str]:
    """The usual keys of providers whose address the environment gives: a server of one's own may
    want none."""
    if isinstance(job, SweConfig):
        return set()
    own: set[str | None] = set()
    others: set[str | None] = set()
    for service in _services(job):
        address = BASE_URL.get(service.provider or "", "")
        named = service.base_url or service.api_key or service.api_key_env
        (own if environ.get(address) and not named else others).add(_key_name(service))
    return {name for name in own - others if name}


def _reason(name: str, job: Job) -> str:
    if name == _HUB:
        return " (a Hub token that may write to the repository of the output)"
    if isinstance(job, JobConfig) and name == usual_key(job.model.provider, job.model.base_url):
        return f" (the key of provider {job.model.provider}; model.api_key_env names another)"
    return ""


def strip_secrets(document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a server does with a document that it is given: ``(document without secrets, env)``.

    Keys in clear move to ``env`` under the names that the document then refers to; a
    secret anywhere else raises ConfigError. Documents that are not valid otherwise pass.
    """
    return _part(document, {}, {})


def _part(
    document: Mapping[str, Any], environ: Mapping[str, str], interpolated: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    problems: list[Problem] = []
    clean = as_json(document, problems, ("job",))
    if not isinstance(clean, dict):
        raise ConfigError([Problem("job", "expected a mapping")])
    found: dict[str, str] = {}
    for path in list(_places(clean)):
        _move(clean, path, found, environ, interpolated, problems)
    for path, source in _leftovers(clean, (), interpolated):
        problems.append(Problem(dotted(_whole(path)), _refusal(path, source)))
    if problems:
        raise ConfigError(problems)
    return clean, found


def _whole(path: Path) -> Path:
    """A path in the wire document as the user's file has it."""
    return path[1:] if path[:1] == ("swe",) else ("job", *path)


def _places(document: dict[str, Any]) -> Iterator[Path]:
    """Where a document may hold a key that can be replaced by its name."""
    teacher = _at(document, (*_OPTIONS, "teacher"))
    teachers = range(len(teacher)) if isinstance(teacher, list) else ()
    for path in (
        ("model", "api_key"),
        (*_OPTIONS, "api_key"),
        (*_OPTIONS, "teacher", "api_key"),
        *((*_OPTIONS, "teacher", number, "api_key") for number in teachers),
        _TOKEN_OPTION,
        ("swe", "llm_api_key"),
    ):
        value = _at(document, path)
        if isinstance(value, str) and value.strip():
            yield path


def _at(document: Any, path: Path) -> Any:
    for step in path:
        if isinstance(document, dict):
            document = document.get(step)
        elif isinstance(document, list) and isinstance(step, int):
            document = document[step]
        else:
            return None
    return document


def _move(
    document: dict[str, Any],
    path: Path,
    found: dict[str, str],
    environ: Mapping[str, str],
    interpolated: Mapping[str, str],
    problems: list[Problem],
) -> None:
    """Take the secret at ``path`` out of the document and leave its name."""
    section = _at(document, path[:-1])
    value = section.pop(path[-1])
    if path == _TOKEN_OPTION:
        name = _HUB  # which ``datasets`` reads by itself, so no reference is needed
    else:
        reference = f"{path[-1]}_env"
        name = _name(path, value, section.get(reference), environ, interpolated)
        section[reference] = name
    if found.setdefault(name, value) != value:
        said = f"two different secrets would both be named {name}; name them apart in api_key_env"
        problems.append(Problem(dotted(_whole(path)), said))


def _name(
    path: Path,
    value: str,
    named: Any,
    environ: Mapping[str, str],
    interpolated: Mapping[str, str],
) -> str:
    if isinstance(named, str) and env_name_problem(named) is None:
        return named
    origin = interpolated.get(dotted(_whole(path)))
    if origin and environ.get(origin) == value and env_name_problem(origin) is None:
        return origin
    words = [str(step) for step in path if step not in ("generation", "swe")]
    return GENERATED + "_".join(words).upper()


def _leftovers(
    value: Any, path: Path, interpolated: Mapping[str, str]
) -> Iterator[tuple[Path, str | None]]:
    """Paths of secrets that no reference can stand for, with the variables they came from."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leftovers(item, (*path, key), interpolated)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leftovers(item, (*path, number), interpolated)
    elif isinstance(value, str) and value.strip():
        key = next((step for step in reversed(path) if isinstance(step, str)), "")
        origin = interpolated.get(dotted(_whole(path)))
        names = (key, *origin.split(",")) if origin else ()
        if is_secret_key(key) or any(map(maybe_secret_key, names)):
            yield path, origin


def _refusal(path: Path, origin: str | None) -> str:
    said = f"holds a secret ({origin})" if origin else "holds a secret, by its name"
    kept = "a job's document is stored and shown"
    if path[:2] == ("runtime", "env") or path[0] in _CODE:
        return f"{said}, but {kept}; user functions are given no secrets"
    return (
        f"{said}, but {kept}; remove it: model keys belong in model.api_key or api_key_env, "
        f"and {_HUB} is forwarded by itself"
    )
