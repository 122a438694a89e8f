# Whether a job of SLURM goes back into its queue, sourced by the files for it, with their
# arguments: `end CODE` after its processes.
#
# 130 (told to stop): always. 75, 134, 137 and 139 (a process was lost, or aborted, killed or
# crashed, as where a GPU fails: srun's code is the highest): yes, but not when the last MOST_LOST attempts in a row made no new checkpoint;
# how many did not is in slurm-JOB.lost. After anything else the same would happen again.
folder='' file=''
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
        --run.folder=*) folder=${!i#*=} ;;
        --run.folder) folder=${!next:-} ;;
        --config=*) file=${!i#*=} ;;
        --config) file=${!next:-} ;;
    esac
done
# Where the command line does not say: a run's own config.yaml, or `folder:` in a config.
[[ -z $folder && $file == */config.yaml && -d ${file%/*}/checkpoints ]] && folder=${file%/*}
[[ -z $folder && -f $file ]] && folder=$(
    sed -nE "s/^([^#]*[{, ])?folder: *['\"]?([^'\",}#]*[^'\",}# ]).*/\2/p" "$file" | head -n 1
)
folder=${folder:-runs}
folder=${folder/#"~"/$HOME}

checkpoints() {
    find -H "$folder" -maxdepth 4 -regex '.*/checkpoints/[0-9]+' 2> /dev/null | sort
}
checkpoints_before=$(checkpoints)

end() {
    local code=$1 lost=slurm-${SLURM_JOB_ID:-}.lost most=${MOST_LOST:-3} times=0
    [[ -n ${SLURM_JOB_ID:-} && $code =~ ^(75|130|134|137|139)$ ]] || exit "$code"
    if [[ $code != 130 && $(checkpoints) == "$checkpoints_before" ]]; then
        times=$(($(cat "$lost" 2> /dev/null || echo 0) + 1))
    fi
    if ((times >= most)); then
        rm -f "$lost"
        echo "$times attempts in a row lost a process before a new checkpoint in $folder:" \
            "the job stays out of the queue" >&2
        exit "$code"
    fi
    echo "$times" > "$lost"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$code"
}
