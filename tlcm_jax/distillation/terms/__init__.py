"""Terms beside the consistency loss, one file each."""
