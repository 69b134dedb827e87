"""Draw a small labeled data set of a jointed figure in UCF-101's layout.

    python3 data/make_toy_actions.py                         # 400 clips into data/toy-actions, 7 s
    python3 data/make_toy_actions.py --groups 10 --output_path toy

All clips of a group share figure, background, speed and camera shake, and a group is never on both sides of
a split. WalkLeft is WalkRight run backwards, and StandUp is SitDown, frame by frame: only the order of the
frames tells the two of a pair apart.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

WIDTH, HEIGHT = 320, 240
FPS = 25
# UCF-101 tests split 1 on groups 1-7, split 2 on 8-14, split 3 on 15-21 of 25: the same shares here.
TEST_SHARE = 7 / 25

# Lengths as shares of the body's height.
HEAD, TORSO, UPPER_ARM, FOREARM, THIGH, SHIN = 0.085, 0.33, 0.17, 0.17, 0.24, 0.24


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
ORDER_PAIRS = [("WalkLeft", "WalkRight"), ("SitDown", "StandUp")]


class Scene:
    """What the clips of a group share: figure, background, speed and camera shake."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.body = HEIGHT * rng.uniform(0.62, 0.74)
        self.thickness = self.body * rng.uniform(0.06, 0.08)
        self.ground = HEIGHT * rng.uniform(0.84, 0.92)
        self.mirrored = bool(rng.random() < 0.5)
        self.wall, self.floor = rng.uniform(110, 225, 3), rng.uniform(90, 190, 3)
        self.skin, self.shirt, self.trousers, self.chair = (self._visible_color(rng) for _ in range(4))
        self.frames = int(rng.integers(40, 65))
        self.cycles = rng.uniform(1.6, 2.6)
        self.shake = rng.uniform(0.3, 2.0)
        self.margin = 8
        self.background = self._draw_background(rng)

    def _visible_color(self, rng: np.random.Generator) -> list[float]:
        while True:
            color = rng.uniform(5, 250, 3)
            if min(np.linalg.norm(color - self.wall), np.linalg.norm(color - self.floor)) > 110:
                return color.tolist()

    def _draw_background(self, rng: np.random.Generator) -> np.ndarray:
        height, width = HEIGHT + 2 * self.margin, WIDTH + 2 * self.margin
        shade = np.linspace(rng.uniform(0.8, 1), rng.uniform(0.8, 1), width)[None, :, None]
        picture = np.tile(self.wall, (height, width, 1)) * shade
        horizon = int(self.ground + self.margin - 0.06 * HEIGHT)
        picture[horizon:] = self.floor * shade
        for _ in range(rng.integers(1, 4)):  # pictures, windows, furniture against the wall
            x, y = rng.integers(0, [width, horizon]).tolist()
            size = rng.integers(15, 60, 2).tolist()
            color = (self.wall + rng.uniform(-60, 60, 3)).tolist()
            if rng.random() < 0.6:
                cv2.rectangle(picture, (x, y), (x + size[0], min(y + size[1], horizon)), color, -1)
            else:
                cv2.circle(picture, (x, min(y, horizon - 30)), size[0] // 2, color, -1, cv2.LINE_AA)
        noise = cv2.resize(rng.normal(0, 2, (height // 4, width // 4, 3)), (width, height))
        return np.clip(picture + noise, 0, 255).astype(np.uint8)


def _limb(start: np.ndarray, angle: float, length: float) -> np.ndarray:
    return start + length * np.array([np.sin(angle), np.cos(angle)])


def draw_figure(picture: np.ndarray, scene: Scene, pose: Pose, *, chair: bool) -> None:
    """Draw `pose` into `picture` (H, W, 3, uint8, BGR), feet on the ground; mirrored where the scene is."""
    unit = scene.body * pose.scale
    thickness = scene.thickness * pose.scale
    legs = [[np.zeros(2), _limb(np.zeros(2), thigh, THIGH * unit)] for thigh, _ in pose.legs]
    for leg, (_, shin) in zip(legs, pose.legs, strict=True):
        leg.append(_limb(leg[1], shin, SHIN * unit))
    ground = scene.ground - 0.12 * HEIGHT * (1 - pose.scale)
    lowest = max(leg[2][1] for leg in legs)
    # On a chair the feet stay where they are and the hip moves; elsewhere the hip leads.
    hip_x = pose.x * WIDTH - (legs[0][2][0] if chair else 0)
    hip = np.array([hip_x, ground - pose.lift * unit - lowest])
    neck = hip + TORSO * unit * np.array([np.sin(pose.torso), -np.cos(pose.torso)])
    head = neck + 1.35 * HEAD * unit * np.array([np.sin(pose.torso), -np.cos(pose.torso)])

    def to_picture(point: np.ndarray) -> tuple[int, int]:
        x = WIDTH - point[0] if scene.mirrored and chair else point[0]
        return round(float(x)), round(float(point[1]))

    def line(start: np.ndarray, end: np.ndarray, color: list[float], thickness: float) -> None:
        cv2.line(picture, to_picture(start), to_picture(end), color, max(2, round(thickness)), cv2.LINE_AA)

    if chair:
        seat_y, seat_x = ground - SHIN * unit + 0.06 * unit, pose.x * WIDTH - 0.24 * unit
        left, right = np.array([seat_x - 0.13 * unit, seat_y]), np.array([seat_x + 0.13 * unit, seat_y])
        for foot in (left, right):
            line(foot, np.array([foot[0], ground]), scene.chair, 0.03 * unit)
        line(left, right, scene.chair, 0.05 * unit)
        line(left, left - [0, 0.3 * unit], scene.chair, 0.04 * unit)
    for start, knee, foot in legs:
        line(hip + start, hip + knee, scene.trousers, thickness)
        line(hip + knee, hip + foot, scene.trousers, thickness * 0.85)
    line(hip, neck, scene.shirt, thickness * 1.7)
    for upper, fore in pose.arms:
        shoulder = neck + np.array([0, 0.03 * unit])
        elbow = _limb(shoulder, upper, UPPER_ARM * unit)
        line(shoulder, elbow, scene.shirt, thickness * 0.8)
        line(elbow, _limb(elbow, fore, FOREARM * unit), scene.skin, thickness * 0.7)
    cv2.circle(picture, to_picture(head), round(HEAD * unit), scene.skin, -1, cv2.LINE_AA)


def draw_clip(action: str, seed: int, group: int, number: int) -> list[np.ndarray]:
    """Frames of one clip, each (240, 320, 3) uint8 BGR; the same arguments draw the same frames.

    The random numbers do not depend on `action`, so that `ORDER_PAIRS` mirror each other in time.
    """
    motion, backwards, chair = ACTIONS[action]
    scene = Scene(np.random.default_rng([seed, group]))
    rng = np.random.default_rng([seed, group, number])
    length = scene.frames
    shake = np.cumsum(rng.normal(0, scene.shake, (length, 2)), axis=0)
    shake = np.clip(shake - shake.mean(0), -scene.margin, scene.margin) + scene.margin
    shift, speed = rng.uniform(-0.06, 0.06), scene.cycles * rng.uniform(0.9, 1.1)
    frames = []
    for t in range(length):
        pose = motion(t / (length - 1), speed)
        pose.x += shift
        left, top = np.round(shake[t]).astype(int)
        picture = scene.background[top : top + HEIGHT, left : left + WIDTH].copy()
        draw_figure(picture, scene, pose, chair=chair)
        frames.append(picture)
    return frames[::-1] if backwards else frames


def write_clip(path: Path, action: str, seed: int, group: int, number: int) -> None:
    """Draw one clip and write it to `path` (AVI, MPEG-4 part 2, tagged XVID); whole or not at all."""
    cv2.setNumThreads(1)
    partial = path.with_name(f".{path.stem}.partial.avi")
    codec = cv2.VideoWriter.fourcc(*"XVID")
    writer = cv2.VideoWriter(str(partial), cv2.CAP_FFMPEG, codec, FPS, (WIDTH, HEIGHT))
    if not writer.isOpened():
        raise OSError(f"cannot write {partial}: this OpenCV has no MPEG-4 encoder; reinstall opencv-python")
    for frame in draw_clip(action, seed, group, number):
        writer.write(frame)
    writer.release()
    partial.replace(path)


def make_data_set(output_path: Path, *, groups: int, clips_per_group: int, seed: int, workers: int) -> int:
    """Draw the whole data set into the folder `output_path`; returns the number of clips."""
    if output_path.exists() and any(output_path.iterdir()):
        raise FileExistsError(f"{output_path} is not empty: choose another --output_path, or move it away")
    # Drawn beside and renamed, so that a data set that is there is a whole one.
    partial = output_path.with_name(f".{output_path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    videos, lists, names = partial / "UCF-101", partial / "ucfTrainTestlist", list(ACTIONS)
    clips = [
        (f"{name}/v_{name}_g{group:02d}_c{number:02d}.avi", name, group, number)
        for name, group, number in product(names, range(1, groups + 1), range(1, clips_per_group + 1))
    ]
    for name in names:
        (videos / name).mkdir(parents=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(write_clip, videos / clip, name, seed, *rest) for clip, name, *rest in clips]
        for job in tqdm(jobs, desc="drawing toy clips", unit="clip"):
            job.result()
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    per_split = max(1, round(groups * TEST_SHARE))
    for split in (1, 2, 3):
        tested = {1 + ((split - 1) * per_split + i) % groups for i in range(per_split)}
        test = [clip for clip, _, group, _ in clips if group in tested]
        train = [f"{clip} {names.index(name) + 1}" for clip, name, group, _ in clips if group not in tested]
        (lists / f"trainlist{split:02d}.txt").write_text("\n".join(train) + "\n")
        (lists / f"testlist{split:02d}.txt").write_text("\n".join(test) + "\n")
    if output_path.exists():
        output_path.rmdir()
    partial.replace(output_path)
    return len(clips)


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of make_toy_actions.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, path = parser.add_argument, Path(__file__).resolve().parent / "toy-actions"
    add("--output_path", type=Path, default=path, help="folder to make (default: data/toy-actions)")
    add("--groups", type=int, default=50, help="figures and backgrounds per class; 50 is enough, 4 at least")
    add("--clips_per_group", type=int, default=1, help="1 keeps it small, UCF-101 has 4 to 7")
    add("--seed", type=int, default=0, help="the same seed draws the same files")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes; one per core is fastest")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draw the data set; returns the exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    for name, least in (("groups", 4), ("clips_per_group", 1), ("workers", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.exit(2, f"error: --{name} {getattr(args, name)} is too small: it takes {least} or more\n")
    try:
        count = make_data_set(**vars(args))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} clips of {len(ACTIONS)} classes in {args.output_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
