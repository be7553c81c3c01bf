"""Commands and configs of other trainers, translated into a config of ours."""
