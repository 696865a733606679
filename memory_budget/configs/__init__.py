"""config.json files read into models: one file for each kind of attention, not one for each name. Only what `minitron` can cut is read by hf_config.py."""
