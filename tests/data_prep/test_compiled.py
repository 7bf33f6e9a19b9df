from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from data_prep.compiled import compile_library


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_a_signal_to_the_whole_job_does_not_end_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    compiler, source = tmp_path / "cc", tmp_path / "seven.c"
    compiler.write_text(f'#!/bin/sh\nkill -{name} $$ $PPID\nexec cc "$@"\n')
    compiler.chmod(0o755)
    source.write_text("int seven(void) { return 7; }\n")
    monkeypatch.setenv("CC", str(compiler))
    got: list[int] = []
    number = getattr(signal, f"SIG{name}")
    before = signal.signal(number, lambda number, frame: got.append(number))
    try:
        assert compile_library(source, []).seven() == 7
    finally:
        signal.signal(number, before)
    assert got == [number], "the request is heard afterwards"
