"""Behind the door: settings composed from the command line's words, a user's mistakes said in one line, the page of --help, output whose reader has
gone. Hydra and OmegaConf are known here and nowhere else.
"""
