#!/usr/bin/env bash
# Downloads UCF-101 (6.5 GiB) and its official train / test lists into the folder of this script.
#
#     bash data/download_ucf101.sh
#
# Run it again after a broken connection: it goes on where it was, and leaves alone what is whole already.
#
#     UCF101_BASE_URL          where UCF101.rar lies
#     UCF101_SPLITS_BASE_URL   where UCF101TrainTestSplits-RecognitionTask.zip lies
#     UCF101_INSECURE=1        do not check the server's TLS certificate (see below)
#     UCF101_TRIES             connections per file before giving up, 10
#     UCF101_WAIT              seconds between two of them, 5
set -euo pipefail

# Another script may take the functions below for a data set of its own, whose variables begin with its name.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then data_set=UCF101; fi

# setting NAME DEFAULT: the value of <data set>_NAME
setting() {
    local variable="${data_set}_$1"
    printf '%s' "${!variable:-$2}"
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")"
command -v curl >/dev/null || fail "this script needs curl; install it, for example with: apt install curl"

# A connection that gives less than 1,000 bytes/s for a minute counts as broken.
curl_flags=(--fail --location --show-error --connect-timeout 30 --speed-limit 1000 --speed-time 60)
if [ -t 2 ]; then curl_flags+=(--progress-bar); else curl_flags+=(--silent); fi
if [ "$(setting INSECURE 0)" = 1 ]; then
    echo "warning: ${data_set}_INSECURE=1: the server's certificate is not checked, anybody in between could change the files" >&2
    curl_flags+=(--insecure)
fi

file_size() { wc -c <"$1" | tr -d ' '; }

# The size that the server states for a URL, or nothing where it does not say.
remote_size() {
    curl "${curl_flags[@]}" --silent --head "$1" 2>/dev/null | tr -d '\r' |
        awk 'tolower($1) == "content-length:" { size = $2 } END { if (size != "") print size }' || true
}

rar_tool() {
    if command -v unrar; then return; fi
    if command -v 7z >/dev/null && 7z i 2>/dev/null | grep -qw 'Rar5\?'; then command -v 7z; fi
}

# check_archive FILE URL: is the archive whole? Prints how that was found out.
check_archive() {
    local size
    case "$1:$(rar_tool)" in
    *.zip:*)
        python3 -c 'import sys, zipfile; sys.exit(bool(zipfile.ZipFile(sys.argv[1]).testzip()))' "$1" 2>/dev/null &&
            echo "every file in it tested by Python"
        ;;
    *:*unrar) unrar t -inul "$1" >/dev/null 2>&1 && echo "every file in it tested by unrar" ;;
    *:*7z) 7z t "$1" >/dev/null 2>&1 && echo "every file in it tested by 7z" ;;
    *)
        [ "$(head -c 4 "$1")" = 'Rar!' ] || return 1
        size="$(remote_size "$2")"
        [ -n "$size" ] || fail "$1: neither unrar nor the size that the server states is there to check it; install unrar"
        [ "$(file_size "$1")" = "$size" ] && echo "its size is what the server states; unrar, which tests more, is not installed"
        ;;
    esac
}

# download URL FILE
download() {
    # The tools go by the suffix, so the part has that of the file.
    local url="$1" file="$2" part="unfinished-$2" try status size how
    if [ -e "$file" ]; then
        how="$(check_archive "$file" "$url")" || fail "$PWD/$file is damaged: move it away and run this again"
        echo "$file is here already and whole ($how)"
        return
    fi
    size="$(remote_size "$url")"
    for ((try = 1; ; try++)); do
        # A part as large as the file was finished before a kill: asking for more would be an error.
        if [ -s "$part" ] && [ "$(file_size "$part")" = "$size" ]; then break; fi
        echo "downloading $file from $url, from byte $(file_size "$part" 2>/dev/null || echo 0) of ${size:-unknown}"
        status=0
        curl "${curl_flags[@]}" --continue-at - --output "$part" "$url" || status=$?
        case "$status" in
        0) break ;;
        6) fail "$url: no such host; check your network" ;;
        22) fail "$url: the server refused; the URL may have moved, see ${data_set}_BASE_URL in this script" ;;
        23) fail "$PWD/$part cannot be written: is the disk full?" ;;
        33) rm -f "$part" ;; # the server cannot resume
        35 | 51 | 58 | 60 | 77 | 83)
            fail "$url: TLS failed (curl $status). This server has sent incomplete certificates before. If you accept that nobody vouches for the files, run: ${data_set}_INSECURE=1 bash $0"
            ;;
        esac
        [ "$try" -lt "$(setting TRIES 10)" ] || fail "$url: gave up after $try connections; run this again, it goes on where it was"
        sleep "$(setting WAIT 5)"
    done
    if ! how="$(check_archive "$part" "$url")"; then
        mv "$part" "$file.damaged"
        fail "$file arrived damaged and is kept as $PWD/$file.damaged; run this again to start anew"
    fi
    mv "$part" "$file"
    echo "$file is whole ($how)"
}

if [ "$data_set" != UCF101 ]; then return; fi

base_url="$(setting BASE_URL https://www.crcv.ucf.edu/datasets/human-actions/ucf101)"
splits_base_url="$(setting SPLITS_BASE_URL https://www.crcv.ucf.edu/wp-content/uploads/2019/03)"
download "$splits_base_url/UCF101TrainTestSplits-RecognitionTask.zip" ucfTrainTestlist.zip
download "$base_url/UCF101.rar" UCF101.rar

cat <<'NEXT'

Next:
    cd data                         # if you are not there
    unrar x UCF101.rar              # 13,320 videos, another 6.5 GiB
    unzip ucfTrainTestlist.zip
    cd ..
    python3 train.py --dataset_path data/UCF-101 --split_path data/ucfTrainTestlist
NEXT
