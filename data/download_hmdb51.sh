#!/usr/bin/env bash
# Downloads HMDB-51 (2 GB) and its official train / test lists into the folder of this script, and unpacks them.
#
#     bash data/download_hmdb51.sh
#
# Run it again after a broken connection: it goes on where it was, and leaves alone what is whole already.
#
#     HMDB51_BASE_URL     where hmdb51_org.rar and test_train_splits.rar lie
#     HMDB51_INSECURE=1   do not check the server's TLS certificate
#     HMDB51_TRIES        connections per file before giving up, 10
#     HMDB51_WAIT         seconds between two of them, 5
set -euo pipefail

data_set=HMDB51
# Its functions: download, checked and gone on with as UCF-101 is.
source "$(dirname "${BASH_SOURCE[0]}")/download_ucf101.sh"

base_url="$(setting BASE_URL https://serre-lab.clps.brown.edu/wp-content/uploads/2013/10)"
lists=testTrainMulti_7030_splits
clips=hmdb51_org

# unpack_as ARCHIVE NAME: the folder NAME out of an archive, whole or not there
unpack_as() {
    if [ -e "$2" ]; then return; fi
    rm -rf .unpacking
    mkdir .unpacking
    # The tools check every file by its checksum.
    case "$(rar_tool)" in
    *unrar) unrar x -inul -o+ -y "$1" .unpacking/ ;;
    *7z) 7z x -y -o.unpacking "$1" >/dev/null ;;
    *) fail "unpacking $1 needs unrar; install it, for example with: apt install unrar, and run this again" ;;
    esac || fail "$PWD/$1 cannot be unpacked: move it away and run this again; or is the disk full?"
    # With a folder of that name in it, or without.
    mv ".unpacking/$(basename "$2")" "$2" 2>/dev/null || mv .unpacking "$2"
    rm -rf .unpacking
}

download "$base_url/test_train_splits.rar" test_train_splits.rar
download "$base_url/hmdb51_org.rar" hmdb51_org.rar
unpack_as test_train_splits.rar "$lists"
if [ ! -e "$clips" ]; then
    rm -rf .classes ".$clips"
    unpack_as hmdb51_org.rar .classes
    mkdir ".$clips"
    for archive in .classes/*.rar; do
        echo "unpacking $(basename "$archive")"
        unpack_as "$archive" ".$clips/$(basename "$archive" .rar)"
    done
    mv ".$clips" "$clips"
    rm -rf .classes
fi

cat <<NEXT

$(find "$clips" -mindepth 1 -maxdepth 1 -type d | wc -l | tr -d ' ') classes in $PWD/$clips, lists in $PWD/$lists
Next:
    python3 train.py --dataset_path data/hmdb51_org --encoder i3d --split_number all
NEXT
