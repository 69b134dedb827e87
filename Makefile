# `make demo` shows the whole pipeline on drawn clips; `make test` runs lint, types and tests.
# Both create .venv when it is missing and do only what is missing when run again.

PYTHON ?= python3
PY := .venv/bin/python
TOY := data/toy-actions
DEMO := model_checkpoints/demo
DEMO_EPOCHS := 12
DEMO_MODEL := $(DEMO)/ConvLSTM_$(DEMO_EPOCHS).pth
DEMO_CLIP := $(TOY)/UCF-101/JumpingJack/v_JumpingJack_g01_c01.avi
DEMO_RUN := runs/demo
DEMO_VIDEO := annotated/demo.mp4

.PHONY: demo test assets

demo: .venv/installed
	@test -d $(TOY) || $(PY) data/make_toy_actions.py --output_path $(TOY)
	@test -f $(DEMO_MODEL) || { \
		echo "Training on $(TOY) with the encoder efficientnet_lite0: its ImageNet weights come with the installation."; \
		$(PY) train.py --dataset_path $(TOY)/UCF-101 --split_path $(TOY)/ucfTrainTestlist \
			--encoder efficientnet_lite0 --img_dim 112 --sequence_length 16 --no_flip \
			--num_epochs $(DEMO_EPOCHS) --checkpoint_interval $(DEMO_EPOCHS) --output_path $(DEMO) \
			--run_path $(DEMO_RUN); }
	@$(PY) test.py --dataset_path $(TOY)/UCF-101 --split_path $(TOY)/ucfTrainTestlist --checkpoint_model $(DEMO_MODEL) \
		--run_path $(DEMO_RUN)/test
	@test -f $(DEMO_VIDEO) || $(PY) test_on_video.py --video_path $(DEMO_CLIP) --checkpoint_model $(DEMO_MODEL) --output $(DEMO_VIDEO)
	@echo "The annotated video: $(DEMO_VIDEO)"

assets: demo
	$(PY) test_on_video.py --video_path $(DEMO_CLIP) --checkpoint_model $(DEMO_MODEL) --output annotated/toy.gif
	cp annotated/toy.gif assets/

test: .venv/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-test: requirements.txt requirements-onnx.txt requirements-test.txt | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@ .venv/installed
