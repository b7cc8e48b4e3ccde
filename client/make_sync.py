#!/usr/bin/env python3
"""Make the synchronous client from the asynchronous one.

python client/make_sync.py            write src/underpaint/client.py
python client/make_sync.py --check    exit 1 if it is not what src/underpaint/aio.py gives
"""

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "src" / "underpaint"
HEADER = '''"""The synchronous client. Made from ``aio.py`` by ``client/make_sync.py``; change that one."""
'''
RULES = (
    (r"\A\"\"\".*?\"\"\"\n", HEADER),
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\bAsync(Client|Connection|Learning)\b", r"\1"),
    (r"\b(deliver|pause)_async\b", r"\1"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\bfor (\w+) in (\w+):\n +yield \1\n", r"yield from \2\n"),
)


def synchronous(source: str) -> str:
    """The synchronous text of an asynchronous one, formatted."""
    for pattern, replacement in RULES:
        source = re.sub(pattern, replacement, source, flags=re.DOTALL)
    tidy = ["ruff", "check", "--quiet", "--select=I", "--fix", "-"], ["ruff", "format", "--quiet", "-"]
    for command in tidy:
        run = [sys.executable, "-m", *command, "--stdin-filename", str(PACKAGE / "client.py")]
        source = subprocess.run(run, input=source, check=True, capture_output=True, text=True).stdout
    return source


def main() -> int:
    """Write or compare; returns the exit status."""
    wanted = synchronous((PACKAGE / "aio.py").read_text())
    target = PACKAGE / "client.py"
    if "--check" not in sys.argv[1:]:
        target.write_text(wanted)
    elif target.read_text() != wanted:
        print("client.py is not what aio.py gives; run: python client/make_sync.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
