"""From other trainers' configurations and data to ours."""
