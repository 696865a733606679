"""What differs between one process and several: how this process was started, how rows are shared out, and an engine each for one process, DDP,
FSDP2 and DeepSpeed's ZeRO, all with the same gradients and the same whole tensors to save. Whatever calls torch.distributed or deepspeed belongs here.
"""
