"""The tutorial's YAMLs: to answer, to train, and the model's own; and an original tree with data sets."""

import json
from pathlib import Path

STAGE_1 = """\
model:
  arch: mini_gpt4
  model_type: pretrain_vicuna
  freeze_vit: True
  freeze_qformer: True


datasets:
  laion:
    vis_processor:
      train:
        name: "blip2_image_train"
        image_size: 224
    text_processor:
      train:
        name: "blip_caption"
    sample_ratio: 115
  cc_sbu:
    vis_processor:
        train:
          name: "blip2_image_train"
          image_size: 224
    text_processor:
        train:
          name: "blip_caption"
    sample_ratio: 14


run:
  task: image_text_pretrain
  # optimizer
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 1e-4
  min_lr: 8e-5
  warmup_lr: 1e-6

  weight_decay: 0.05
  max_epoch: 4
  batch_size_train: 64
  batch_size_eval: 64
  num_workers: 4
  warmup_steps: 5000
  iters_per_epoch: 5000

  seed: 42
  output_dir: "output/minigpt4_stage1_pretrain"

  amp: True
  resume_ckpt_path: null

  evaluate: False
  train_splits: ["train"]

  device: "cuda"
  world_size: 1
  dist_url: "env://"
  distributed: True
"""

STAGE_2 = """\
model:
  arch: mini_gpt4
  model_type: pretrain_vicuna
  freeze_vit: True
  freeze_qformer: True
  max_txt_len: 160
  end_sym: "###"
  prompt_path: "prompts/alignment.txt"
  prompt_template: '###Human: {} ###Assistant: '
  ckpt: '/path/to/stage1/checkpoint/'


datasets:
  cc_sbu_align:
    vis_processor:
      train:
        name: "blip2_image_train"
        image_size: 224
    text_processor:
      train:
        name: "blip_caption"

run:
  task: image_text_pretrain
  # optimizer
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 3e-5
  min_lr: 1e-5
  warmup_lr: 1e-6

  weight_decay: 0.05
  max_epoch: 5
  iters_per_epoch: 200
  batch_size_train: 12
  batch_size_eval: 12
  num_workers: 4
  warmup_steps: 200

  seed: 42
  output_dir: "output/minigpt4_stage2_finetune"

  amp: True
  resume_ckpt_path: null

  evaluate: False
  train_splits: ["train"]

  device: "cuda"
  world_size: 1
  dist_url: "env://"
  distributed: True
"""

EVAL = """\
model:
  arch: mini_gpt4
  model_type: pretrain_vicuna
  freeze_vit: True
  freeze_qformer: True
  max_txt_len: 160
  end_sym: "###"
  low_resource: True
  prompt_path: "prompts/alignment.txt"
  prompt_template: '###Human: {} ###Assistant: '
  ckpt: 'pretrained_minigpt4.pth'


datasets:
  cc_sbu_align:
    vis_processor:
      train:
        name: "blip2_image_eval"
        image_size: 224
    text_processor:
      train:
        name: "blip_caption"

run:
  task: image_text_pretrain
"""

MODEL = """\
model:
  arch: mini_gpt4

  # vit encoder
  image_size: 224
  drop_path_rate: 0
  use_grad_checkpoint: False
  vit_precision: "fp16"
  freeze_vit: True
  freeze_qformer: True

  # Q-Former
  num_query_token: 32

  # Vicuna
  llama_model: "/path/to/vicuna/weights/"

  # generation configs
  prompt: ""

preprocess:
    vis_processor:
        train:
          name: "blip2_image_train"
          image_size: 224
        eval:
          name: "blip2_image_eval"
          image_size: 224
    text_processor:
        train:
          name: "blip_caption"
        eval:
          name: "blip_caption"
"""

PROMPTS = """\
<Img><ImageHere></Img> Describe this image in detail.
<Img><ImageHere></Img> Take a look at this image and describe what you notice.
<Img><ImageHere></Img> Please provide a detailed description of the picture.
<Img><ImageHere></Img> Could you describe the contents of this image for me?
"""

DATASET = """\
datasets:
  {name}:
    data_type: images
    build_info:
      storage: {storage}
"""

STORAGE = {
    "laion/defaults.yaml": ("laion", "data/laion_dataset/{00000..00002}.tar"),
    "cc_sbu/defaults.yaml": ("cc_sbu", "data/cc_sbu_dataset/{00000..00001}.tar"),
    "cc_sbu/align.yaml": ("cc_sbu_align", "data/cc_sbu_align/"),
}


def write_tree(root: Path) -> Path:
    """Write an original tree below a folder; the data sets have no content."""
    for folder in ("train_configs", "prompts", "minigpt4/configs/models", "data/cc_sbu_align/image"):
        (root / folder).mkdir(parents=True)
    stages = {"stage1_pretrain": STAGE_1, "stage2_finetune": STAGE_2}
    for name, text in stages.items():
        (root / f"train_configs/minigpt4_{name}.yaml").write_text(text, encoding="utf-8")
    (root / "minigpt4/configs/models/minigpt4.yaml").write_text(MODEL, encoding="utf-8")
    (root / "prompts/alignment.txt").write_text(PROMPTS, encoding="utf-8")
    for file, (name, storage) in STORAGE.items():
        path = root / "minigpt4/configs/datasets" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(DATASET.format(name=name, storage=storage), encoding="utf-8")
    for folder, shards in (("laion_dataset", 3), ("cc_sbu_dataset", 2)):
        (root / "data" / folder).mkdir()
        for number in range(shards):
            (root / "data" / folder / f"{number:05}.tar").touch()
    annotations = json.dumps({"annotations": []})
    (root / "data/cc_sbu_align/filter_cap.json").write_text(annotations, encoding="utf-8")
    return root
