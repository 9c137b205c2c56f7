"""The names of the files in an output folder, --output_dir of train.py. This list also says who reads each of them.

prefix_encoder.safetensors   the trainable weights; read by train.py --prefix_from (prefixes.py)
adapter_model.safetensors    the baked prefix as PEFT stores it; read by infer.py, PEFT and, where a folder has no encoder,
                             train.py --prefix_from (prefixes.py)
adapter_config.json          its shape and the name of its base; read with it. Written after it: a folder that has this file
                             has a whole prefix, and train.py replaces it only with --overwrite_output_dir
training_config.json         the settings of the run, versions and device; for people, the model card, and for a resume,
                             which knows by it whether the same torchrun wrote the folder
metrics.jsonl                losses, evaluations and speed, one JSON object per line; for people, the curves and the card. A
                             resume keeps the lines up to its checkpoint
training.png                 the curves; for people
learning_rate.png            the trials by which a learning rate was found; for people
README.md                    the model card; for people and the hub
tensorboard/                 the metrics once more, with --report_to tensorboard; for TensorBoard
checkpoint-STEP.safetensors  all that the next steps depend on; read by --resume_from_checkpoint (checkpoints.py)
checkpoint-STEP.set-aside    a checkpoint later than the one that was resumed; nobody reads it, a new run removes it
.NAME.draft/                 holds NAME while it is written; if a kill leaves one, the next run removes it (writing.py)
"""

ENCODER_FILE = "prefix_encoder.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
CONFIG_FILE = "training_config.json"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "training.png"
SEARCH_FILE = "learning_rate.png"
CARD_FILE = "README.md"
BOARD_FOLDER = "tensorboard"
