"""Pieces of prompts follow what steps last, here by a clock of the test's own."""

from __future__ import annotations

from pylora.serving.pace import SMALLEST, STALL, Pace


def settled(base: float, each: float, steps: int = 600, most: int = 512) -> tuple[int, list[float]]:
    """The piece that is come to, and what the last steps lasted, where a token of a prompt takes
    `each` seconds."""
    pace, lasted = Pace(most), []
    for _ in range(steps):
        piece = pace.piece(4)
        seconds = base + each * piece
        pace.note(4, piece, seconds)
        if piece:
            lasted.append(seconds)
    return piece or pace.piece(4) or SMALLEST, lasted[-200:]


def test_a_piece_is_as_large_as_the_stall_allows() -> None:
    for base, each in ((0.01, 1e-4), (0.01, 1e-5), (0.1, 1e-4), (0.002, 1e-5)):
        piece, lasted = settled(base, each)
        allowed = (STALL - 1) * base / each
        assert piece <= max(allowed, SMALLEST)
        assert piece >= min(allowed / 2.1, 512) or piece == SMALLEST
        late = sorted(lasted)[int(0.98 * len(lasted))]
        assert late <= 2 * base or piece == SMALLEST


def test_nobody_waits_then_a_piece_is_the_largest() -> None:
    pace = Pace(300)
    assert pace.piece(0) == 300
    pace.note(0, 300, 1.0)
    assert pace.piece(3) == 0, "first it is measured what a step lasts"
    pace.note(3, 0, 0.01)
    assert pace.piece(3) == SMALLEST == pace.piece(30)


def test_a_slow_moment_is_forgotten() -> None:
    pace = Pace(512)
    for i in range(400):
        piece = pace.piece(2)
        pace.note(2, piece, 5.0 if i == 200 else 0.01 + piece * 1e-5)
    base = pace.alone(2)
    assert base is not None and base < 0.012 and pace.piece(2) in (0, 256, 512)
