"""How one model is trained on many processes: the same mathematics behind FSDP2, DeepSpeed ZeRO and DDP."""
