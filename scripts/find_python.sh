#!/bin/sh
# Print the path of an interpreter of one of the versions given (3.12 3.13 …), the first that is
# found: on the PATH, among uv's, among pyenv's, which stand on no PATH while another is chosen.
# One in a folder of its own goes before the system's: agents in containers are shown its folder, and
# /usr would take the place of the image's (docs/swe.md).
version_of="'%d.%d' % sys.version_info[:2]"
for wanted in "sys.base_prefix not in ('/usr', '/usr/local')" True; do
	for version in "$@"; do
		code="import sys; assert $version_of == '$version' and ($wanted); print(sys.executable)"
		for python in "python$version" "$(command -v uv >/dev/null 2>&1 && uv python find --system "$version" 2>/dev/null)"; do
			[ -n "$python" ] || continue
			"$python" -c "$code" 2>/dev/null && exit 0
		done
		if command -v pyenv >/dev/null 2>&1; then
			for name in $(pyenv versions --bare 2>/dev/null | grep "^$version\."); do
				PYENV_VERSION="$name" pyenv exec python -c "$code" 2>/dev/null && exit 0
			done
		fi
	done
done
exit 1
