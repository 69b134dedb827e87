"""How the cost grows with the data: seconds and bytes of the cache, seconds of an epoch, memory.

More clips than there are: the same files under other names.

python3 benchmarks/growth.py --clips 10 100 391 4000
"""

import json
import subprocess
import sys
import tempfile

import common

from utils.device import choose_device

CHILD = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "benchmarks")
import common, torch
from dataset import Sampling
from training.batches import ClipBatches, EmbeddingClips
from features.fill import open_cache
from video.reader import Video
data, encoder, img_dim, count, folder = sys.argv[1:]
every = common.clips(Path(data))
count = int(count)
chosen = [every[index * len(every) // count] for index in range(min(count, len(every)))]
for index in range(len(chosen), count):
    clip, link = every[index % len(every)], Path(folder) / f"links/{index}.avi"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(clip.video.path.resolve())
    chosen.append(replace(clip, name=f"{index}/{clip.name}", video=Video(link)))
model = common.make_model(encoder, torch.device("cpu"), random_weights=False)
start = time.perf_counter()
cache = open_cache(Path(folder), chosen, model.encoder, int(img_dim), flip=False, threads=2)
kept = cache.view(chosen)
fill = time.perf_counter() - start
frames = sum(kept.count(clip) for clip in chosen)
size = sum(path.stat().st_size for path in cache.folder.iterdir() if path.is_file())
optimizer = common.head_optimizer(model)
batches = ClipBatches(len(chosen), 16, shuffle=True)
loader = EmbeddingClips(
    [kept], [model.encoder.spec.windows], chosen,
    Sampling(model.encoder.spec.sequence_length, training=True, flip=False), batches, torch.device("cpu")
)
model.train()
times = []
for batches.epoch in range(3):
    start = time.perf_counter()
    for embeddings, _, labels in loader:
        common.head_step(model, optimizer, embeddings, labels)
    times.append(time.perf_counter() - start)
# Without the pages of mapped files, which the system takes back when it wants to.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
memory = int(status["RssAnon"].split()[0]) / 1024
print(json.dumps(dict(frames=frames, fill=fill, size=size, epoch=sorted(times)[1], memory=memory)))
"""


def main() -> None:
    flags = common.parser(__doc__.split("\n")[0])
    flags.add_argument("--encoder", default="efficientnet_lite0")
    flags.add_argument("--img_dim", type=int, default=112)
    flags.add_argument("--clips", type=int, nargs="+", default=[10, 100, 391])
    args = flags.parse_args()
    print(common.machine(choose_device("cpu")))
    print(f"\n### Growth, {args.encoder} at {args.img_dim} px\n")
    print("| clips | frames | filling, s | ms/frame | cache, MB | bytes/frame | epoch, s | ms/clip | MB |")
    print("| --- " * 9 + "|")
    for count in args.clips:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", CHILD, args.data, args.encoder, args.img_dim, count, folder]
            done = subprocess.run(
                [*map(str, command)], cwd=common.ROOT, capture_output=True, text=True, check=True
            )
        got = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {count} | {got['frames']:,} | {got['fill']:.1f} | {1000 * got['fill'] / got['frames']:.2f} "
            f"| {got['size'] / 1e6:.1f} | {got['size'] / got['frames']:.0f} | {got['epoch']:.2f} "
            f"| {1000 * got['epoch'] / count:.0f} | {got['memory']:,.0f} |"
        )


if __name__ == "__main__":
    main()
