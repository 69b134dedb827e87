"""How the figure of the toy data moves: a pose for each moment of an action."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Pose:
    """Joint angles in radians (0 hangs down; positive swings to the right of the picture)."""

    torso: float = 0.0
    arms: list[tuple[float, float]] = field(default_factory=lambda: [(-0.12, -0.08), (0.12, 0.08)])
    legs: list[tuple[float, float]] = field(default_factory=lambda: [(-0.08, -0.05), (0.08, 0.05)])
    lift: float = 0.0  # feet above the ground, in body heights
    x: float = 0.5  # hip's (on a chair: feet's) place across the picture, 0 to 1
    scale: float = 1.0  # nearer to the camera is larger


def walk_right(phase: float, cycles: float) -> Pose:
    """From far left to near right; the body is symmetrical, so that a single frame shows no direction."""
    swing = 0.5 * np.sin(2 * np.pi * cycles * phase)
    arms = [(-0.8 * swing, -0.8 * swing), (0.8 * swing, 0.8 * swing)]
    legs = [(swing, swing), (-swing, -swing)]
    return Pose(arms=arms, legs=legs, x=0.1 + 0.75 * phase, scale=0.55 + 0.65 * phase)


def sit_down(phase: float, cycles: float) -> Pose:
    """From standing to sitting on a chair, seen from the side; still at both ends."""
    bend = 0.5 - 0.5 * np.cos(np.pi * np.clip(1.4 * phase - 0.2, 0, 1))
    lean = 0.5 * np.sin(np.pi * bend)
    legs = [(1.5 * bend + 0.02, 0.0), (1.5 * bend - 0.02, 0.0)]
    return Pose(torso=lean, arms=[(0.9 * bend, 1.3 * bend), (0.8 * bend, 1.2 * bend)], legs=legs)


def wave(phase: float, cycles: float) -> Pose:
    """One arm up, its forearm from side to side."""
    side = 0.55 * np.sin(2 * np.pi * 1.5 * cycles * phase)
    return Pose(arms=[(-0.12, -0.08), (2.2, 2.9 + side)])


def squat(phase: float, cycles: float) -> Pose:
    """Down and up again, seen from the front, arms stretched out below."""
    bend = 0.5 - 0.5 * np.cos(2 * np.pi * cycles * phase)
    legs = [(-1.25 * bend - 0.1, 0.75 * bend), (1.25 * bend + 0.1, -0.75 * bend)]
    return Pose(arms=[(-1.5 * bend - 0.1,) * 2, (1.5 * bend + 0.1,) * 2], legs=legs)


def jumping_jack(phase: float, cycles: float) -> Pose:
    """Arms and legs apart and together, jumping."""
    spread = 0.5 - 0.5 * np.cos(2 * np.pi * 1.5 * cycles * phase)
    arm, leg = 0.15 + 2.6 * spread, 0.05 + 0.5 * spread
    lift = 0.1 * np.sin(np.pi * spread)
    return Pose(arms=[(-arm, -arm), (arm, arm)], legs=[(-leg, -leg), (leg, leg)], lift=lift)


def bow(phase: float, cycles: float) -> Pose:
    """Down from the hip and up again, once, seen from the side."""
    bend = 1.35 * np.sin(np.pi * np.clip(1.3 * phase - 0.15, 0, 1)) ** 2
    arms = [(0.35 * bend,) * 2, (0.35 * bend + 0.1,) * 2]
    return Pose(torso=bend, arms=arms, legs=[(-0.03, -0.03), (0.03, 0.03)])


def wave_then_squat(phase: float, cycles: float) -> Pose:
    """Some seconds of the one, and then of the other."""
    return wave(2 * phase, 2 * cycles) if phase < 0.5 else squat(2 * phase - 1, 2 * round(cycles))


def slow_then_fast(phase: float, cycles: float) -> Pose:
    """Jumping jacks, from the middle on three times as fast."""
    return jumping_jack(phase if phase < 0.5 else 3 * phase - 1, 2 * cycles)


# class: (motion, run backwards, on a chair)
ACTIONS = {
    "WalkLeft": (walk_right, True, False),
    "WalkRight": (walk_right, False, False),
    "SitDown": (sit_down, False, True),
    "StandUp": (sit_down, True, True),
    "Wave": (wave, False, False),
    "Squat": (squat, False, False),
    "JumpingJack": (jumping_jack, False, False),
    "Bow": (bow, False, False),
}
# Each is an action whose frames run backwards look like itself, and then another one.
SEQUENCES = {
    "WaveThenSquat": (wave_then_squat, False, False),
    "SquatThenWave": (wave_then_squat, True, False),
    "SlowThenFast": (slow_then_fast, False, False),
    "FastThenSlow": (slow_then_fast, True, False),
}
KINDS = {"single": ACTIONS, "sequences": SEQUENCES}
ORDER_PAIRS = [
    ("WalkLeft", "WalkRight"),
    ("SitDown", "StandUp"),
    ("WaveThenSquat", "SquatThenWave"),
    ("SlowThenFast", "FastThenSlow"),
]
# Of a sequence, against the length of an action: 6 to 10 seconds.
LONGER = 4
