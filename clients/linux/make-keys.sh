#!/bin/sh
# A private certificate authority, the SuperLink's certificate, and a key per SuperNode.
#
#   make-keys.sh DIR server HOST...   the authority, if DIR has none, and a certificate for
#                                     the SuperLink under these names and addresses (and
#                                     localhost, where a device's relay stands)
#   make-keys.sh DIR node NAME...     a key pair for each SuperNode
#
# DIR/ca.crt goes to every device and to whoever runs `flwr`; DIR/nodes/NAME goes to that
# device alone, and DIR/nodes/NAME.pub is registered with the SuperLink. ca.key signs
# further certificates: keep it off the SuperLink. Private files are readable by their
# owner alone, and nothing is ever overwritten.
set -eu
umask 077

fail() {
    echo "error: $*" >&2
    exit 1
}

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit "$1"
}

need() {
    command -v "$1" >/dev/null || fail "$1 is not installed (Debian: apt install $2)."
}

new() {
    [ ! -e "$1" ] || fail "$1 exists; nothing is overwritten. Move it away first."
}

make_authority() {
    new "$dir/ca.crt"
    openssl ecparam -name secp384r1 -genkey -noout -out "$dir/ca.key"
    openssl req -x509 -new -key "$dir/ca.key" -sha384 -days 3650 -out "$dir/ca.crt" \
        -subj "/CN=lola-flwr private CA" \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
        -addext "keyUsage=critical,keyCertSign,cRLSign"
    chmod 644 "$dir/ca.crt"
    echo "$dir/ca.crt: the authority, for 10 years"
}

make_server() {
    new "$dir/server.key"
    new "$dir/server.crt"
    [ -e "$dir/ca.key" ] || make_authority
    names="DNS:localhost,IP:127.0.0.1"
    for host in "$@"; do
        case $host in
            localhost | 127.0.0.1) ;;
            *:*) names="$names,IP:$host" ;;
            *[!0-9.]*) names="$names,DNS:$host" ;;
            *) names="$names,IP:$host" ;;
        esac
    done
    extensions=$(mktemp)
    request=$(mktemp)
    trap 'rm -f "$extensions" "$request"' EXIT
    {
        echo "subjectAltName=$names"
        echo "basicConstraints=critical,CA:FALSE"
        echo "subjectKeyIdentifier=hash"
        echo "authorityKeyIdentifier=keyid"
        echo "keyUsage=critical,digitalSignature"
        echo "extendedKeyUsage=serverAuth"
    } >"$extensions"
    openssl ecparam -name secp384r1 -genkey -noout -out "$dir/server.key"
    openssl req -new -key "$dir/server.key" -subj "/CN=$1" -out "$request"
    openssl x509 -req -in "$request" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" \
        -CAcreateserial -sha384 -days 825 -extfile "$extensions" \
        -out "$dir/server.crt" 2>/dev/null
    chmod 644 "$dir/server.crt"
    echo "$dir/server.crt: the SuperLink's certificate for $names, for 825 days"
}

make_node() {
    case $1 in
        *[!A-Za-z0-9._-]* | .* | -*) fail "node name '$1': use letters, digits, . _ -" ;;
    esac
    mkdir -p "$dir/nodes"
    new "$dir/nodes/$1"
    new "$dir/nodes/$1.pub"
    # Flower reads OpenSSH's format, which openssl does not write.
    ssh-keygen -q -t ecdsa -b 384 -N '' -C "$1" -f "$dir/nodes/$1"
    echo "$dir/nodes/$1: the key of SuperNode $1"
}

[ $# -ge 1 ] || usage 2
case $1 in -h | --help) usage 0 ;; esac
[ $# -ge 3 ] || usage 2
dir=$1
what=$2
shift 2
mkdir -p "$dir"
case $what in
    server)
        need openssl openssl
        make_server "$@"
        ;;
    node)
        need ssh-keygen openssh-client
        for name in "$@"; do make_node "$name"; done
        ;;
    *) usage 2 ;;
esac
