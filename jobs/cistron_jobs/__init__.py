"""Programs: each module is a configuration class and ``run(config)``."""
