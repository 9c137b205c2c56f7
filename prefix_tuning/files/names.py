"""What the files of a run are called."""

ENCODER_FILE = "prefix_encoder.safetensors"


ADAPTER_FILE = "adapter_model.safetensors"


ADAPTER_CONFIG_FILE = "adapter_config.json"


CARD_FILE = "README.md"


CONFIG_FILE = "training_config.json"


METRICS_FILE = "metrics.jsonl"


PLOT_FILE = "training.png"


BOARD_FOLDER = "tensorboard"
