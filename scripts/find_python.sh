#!/bin/sh
# Print the path of an interpreter of one of the versions given (3.12 3.13 …), the first that is
# found: on the PATH, among uv's, among pyenv's, which stand on no PATH while another is chosen.
for version in "$@"; do
	for python in "python$version" "$(command -v uv >/dev/null 2>&1 && uv python find "$version" 2>/dev/null)"; do
		[ -n "$python" ] || continue
		"$python" -c "import sys; assert '%d.%d' % sys.version_info[:2] == '$version'; print(sys.executable)" 2>/dev/null && exit 0
	done
	if command -v pyenv >/dev/null 2>&1; then
		for name in $(pyenv versions --bare 2>/dev/null | grep "^$version\."); do
			PYENV_VERSION="$name" pyenv exec python -c "import sys; print(sys.executable)" 2>/dev/null && exit 0
		done
	fi
done
exit 1
