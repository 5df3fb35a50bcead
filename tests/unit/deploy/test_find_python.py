"""Which interpreter an environment is made with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "find_python.sh"
VERSION = "{}.{}".format(*sys.version_info)
SYSTEMS, OWN = f"/usr/bin/python{VERSION}", f"/opt/own/bin/python{VERSION}"


def pretender(executable: str) -> str:
    """This interpreter, which takes itself for another."""
    prefix = executable.partition("/bin/")[0]
    return f"""#!/bin/sh
exec {sys.executable} -c "import sys; sys.base_prefix = '{prefix}'; sys.executable = '{executable}'
exec(sys.argv[1])" "$2"
"""


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def found(path: Path) -> str:
    done = subprocess.run(
        ["/bin/sh", SCRIPT, VERSION], env={"PATH": str(path)}, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    program(tmp_path / f"python{VERSION}", pretender(SYSTEMS))
    return tmp_path


def test_an_interpreter_in_a_folder_of_its_own_goes_before_the_systems(path: Path) -> None:
    program(path / "own", pretender(OWN))
    program(path / "uv", f"#!/bin/sh\necho {path}/own\n")
    assert found(path) == OWN


def test_the_systems_is_taken_where_there_is_no_other(path: Path) -> None:
    assert found(path) == SYSTEMS


def test_of_another_version_there_is_none(tmp_path: Path) -> None:
    program(tmp_path / "uv", "#!/bin/sh\nexit 2\n")
    assert found(tmp_path) == ""
