"""Where configs and the headers of weights come from: a folder, a file, or the Hub. Headers alone are read, never weights."""
