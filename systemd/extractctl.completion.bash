# bash completion for extractctl: its own --help says what there is.

_extractctl() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local program=${COMP_WORDS[0]} words=() word before='' commands

    COMPREPLY=()
    # bash makes three words of --by=user
    if [[ $current == = ]]; then current=''; elif [[ $previous == = ]]; then previous=${COMP_WORDS[COMP_CWORD - 2]}; fi
    case $previous in
    --color) if [[ ${COMP_WORDS[COMP_CWORD]} == = || ${COMP_WORDS[COMP_CWORD - 1]} == = ]]; then
            mapfile -t COMPREPLY < <(compgen -W "auto always never" -- "$current")
            return
        fi ;;
    --config) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current"); return ;;
    --by) mapfile -t COMPREPLY < <(compgen -W "$("$program" usage --help | sed -n 's/^  --by .*sum by//p' | tr -c 'a-z\n' ' ' |
        sed 's/ default / /; s/ or / /')" -- "$current"); return ;;
    --company | --company-name | --limit | --threshold | --provider | --reason | --request | --since | --until | --rows | --label) return ;;
    esac

    # The words so far that are no options: a command, or its beginning.
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ $word != -* && $word != = && $before != = && ${#words[@]} -lt 2 ]]; then words+=("$word"); fi
        before=$word
    done
    # "token add" and so on, one on a line
    commands=$("$program" --help 2>/dev/null | sed -n '/^$/,/^$/s/^  \([a-z][a-z-]*\( [a-z][a-z-]*\)\{0,1\}\).*/\1/p')

    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "--help $({ "$program" "${words[@]}" --help || "$program" --help; } 2>/dev/null |
            sed -n 's/^  \(--[a-z-]*\).*/\1/p' | grep -vx -e --help)" -- "$current")
        return
    fi
    case ${#words[@]} in
    0) mapfile -t COMPREPLY < <(compgen -W "$(cut -d' ' -f1 <<<"$commands" | sort -u)" -- "$current") ;;
    1) mapfile -t COMPREPLY < <(compgen -W "$(sed -n "s/^${words[0]} //p" <<<"$commands")" -- "$current") ;;
    *) if [[ "${words[*]}" == "token set-status" ]]; then
           mapfile -t COMPREPLY < <(compgen -W "Active Expired Exceeded Disabled" -- "$current")
       fi ;;
    esac
}

complete -F _extractctl extractctl
