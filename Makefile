# `make demo` shows the whole pipeline on drawn clips; `make test` runs lint, types and tests,
# `make test-browser` those that need a browser and a screen, `make test-cuda` those that need a GPU. All
# create .venv when it is missing and do only what is missing when run again.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
TOY := data/toy-actions
DEMO := model_checkpoints/demo
DEMO_EPOCHS := 12
DEMO_MODEL := $(DEMO)/ConvLSTM_$(DEMO_EPOCHS).pth
DEMO_CLIP := $(TOY)/UCF-101/JumpingJack/v_JumpingJack_g01_c01.avi
DEMO_RUN := runs/demo
DEMO_VIDEO := annotated/demo.mp4
# One more than cores, since some tests wait for processes of their own; a file shares what it sets up.
TEST_PROCESSES = $(shell $(PY) -c "from utils.process import available_cores; print(min(8, 1 + available_cores()))")

.PHONY: demo test test-browser test-cuda assets

demo: .venv/installed
	@test -d $(TOY) || $(PY) data/make_toy_actions.py --output_path $(TOY)
	@test -f $(DEMO_MODEL) || { \
		echo "Training on $(TOY) with the encoder efficientnet_lite0: its ImageNet weights come with the installation."; \
		$(PY) train.py --dataset_path $(TOY)/UCF-101 --split_path $(TOY)/ucfTrainTestlist \
			--encoder efficientnet_lite0 --img_dim 112 --sequence_length 16 --no_flip \
			--num_epochs $(DEMO_EPOCHS) --checkpoint_interval 3 --output_path $(DEMO) \
			--run_path $(DEMO_RUN); }
	@$(PY) test.py --dataset_path $(TOY)/UCF-101 --split_path $(TOY)/ucfTrainTestlist --checkpoint_model $(DEMO_MODEL) \
		--run_path $(DEMO_RUN)/test
	@test -f $(DEMO_VIDEO) || $(PY) test_on_video.py --video_path $(DEMO_CLIP) --checkpoint_model $(DEMO_MODEL) --output $(DEMO_VIDEO)
	@echo "The annotated video: $(DEMO_VIDEO)"
	@echo "Your own video, with 400 actions: $(PY) test_on_video.py --video_path x.avi"

# Half of the frames, three quarters of the width.
define SHRINK
from PIL import Image
gif, frames = Image.open("annotated/JumpingJack.gif"), []
for number in range(0, gif.n_frames, 2):
    gif.seek(number)
    frames.append(gif.convert("RGB").resize((240, 240 * gif.height // gif.width)))
frames[0].save("assets/JumpingJack.gif", save_all=True, append_images=frames[1:], duration=80, loop=0)
endef
export SHRINK

# A frame of each heat map.
define JOIN
import numpy as np
from pathlib import Path
from PIL import Image
from video.reader import Video
frames = [list(Video(Path(f"annotated/{name}.mp4")).frames()) for name in ("Bow", "JumpingJack", "Wave")]
Image.fromarray(np.concatenate([each[len(each) // 2] for each in frames], 1)).save("assets/heatmap.png")
endef
export JOIN

# Every picture of the README, from the toy data.
assets: .venv/installed-browser demo
	@mkdir -p annotated assets
	$(PY) test_on_video.py --video_path $(DEMO_CLIP) --checkpoint_model $(DEMO_MODEL) --output annotated/JumpingJack.gif
	$(PY) -c "$$SHRINK"
	SCREENSHOTS=annotated $(PY) -m pytest -q -m browser -k drawn
	cp annotated/drawn-taught.png assets/teach.png
	$(PY) train.py --dataset_path $(TOY)/UCF-101 --split_path $(TOY)/ucfTrainTestlist --encoder i3d --model LinearProbe \
		--output_path $(DEMO)-i3d --run_path runs/demo-i3d
	for action in Bow JumpingJack Wave; do $(PY) test_on_video.py --heatmap --overlay minimal --output annotated/$$action.mp4 \
		--video_path $(TOY)/UCF-101/$$action/v_$${action}_g01_c01.avi --checkpoint_model $(DEMO)-i3d/LinearProbe_20.pth; done
	$(PY) -c "$$JOIN"

test: .venv/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile

# The page names the action with the model that `make demo` trains.
test-browser: .venv/installed-browser demo
	$(PY) -m pytest -m browser

# On a machine with a GPU: that it computes what a CPU does, and how fast.
test-cuda: .venv/installed-test
	@$(PY) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'PyTorch finds no CUDA device here, so nothing is proved')"
	$(PY) -m pytest -m cuda
	$(PY) benchmarks/gpu.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt requirements-i3d.txt | .venv/bin/python
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -r requirements-i3d.txt
	@touch $@

.venv/installed-test: .venv/installed requirements-onnx.txt requirements-demo.txt requirements-hf.txt requirements-openvino.txt requirements-test.txt
	$(PIP) -r requirements-test.txt
	@touch $@

.venv/installed-browser: requirements-browser.txt .venv/installed-test
	$(PIP) -r requirements-browser.txt
	@command -v chromium >/dev/null && command -v Xvfb >/dev/null || { \
		echo "Installing Chromium, Xvfb and fonts from Debian's packages."; \
		sudo=$$(test $$(id -u) = 0 || echo sudo); \
		$$sudo apt-get update -qq && $$sudo apt-get install -qq -y --no-install-recommends chromium xvfb fonts-noto-core fonts-wqy-zenhei >/dev/null; }
	@touch $@
