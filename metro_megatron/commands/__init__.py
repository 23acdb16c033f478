"""The user's commands: console scripts of an installation, and the files of tools/ in a checkout."""
