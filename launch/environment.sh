# What a pod's processes see, sourced by the other files here. A value that is set
# already stays; docs/pods.md says why each is as it is.

# The card's memory for XLA: the rest is for NCCL's buffers and the CUDA context.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# NCCL says what is wrong, and no more.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A shell that Python writes into from many processes shows each line at once.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
