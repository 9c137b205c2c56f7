"""The names of the files in an output folder (--output_dir of train.py), and who reads each of them.

prefix_encoder.safetensors   the trainable weights; read by train.py --prefix_from (prefixes.py)
adapter_model.safetensors    the baked prefix as PEFT stores it; read by infer.py and PEFT, and by train.py --prefix_from
                             if the folder has no encoder (prefixes.py)
adapter_config.json          the shape of the prefix and the name of its base; read with it, but written after it: a folder
                             with this file has a whole prefix, which train.py replaces only with --overwrite_output_dir
training_config.json         the settings of the run, versions and device; read by people, for the model card, and by a
                             resume, which tells by it whether the same torchrun wrote the folder
metrics.jsonl                losses, evaluations and speed, one JSON object per line; read by people, for the curves and for
                             the card; a resume keeps the lines up to its checkpoint
training.png                 the curves; for people
learning_rate.png            the trials by which a learning rate was found; for people
README.md                    the model card; for people and the hub
tensorboard/                 the metrics once more, with --report_to tensorboard; read by TensorBoard
teacher_answers.json         of a distillation, the teacher's answers to rows that have none; read by a resume (teacher.py)
checkpoint-STEP.safetensors  everything that the next steps depend on; read by --resume_from_checkpoint (checkpoints.py)
checkpoint-STEP.set-aside    a checkpoint later than the one that was resumed; nobody reads it, and a new run removes it
.NAME.draft/                 holds NAME while it is written; if a killed run leaves one, the next run removes it (writing.py)
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
ANSWERS_FILE = "teacher_answers.json"
