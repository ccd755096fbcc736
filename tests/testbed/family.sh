# shellcheck shell=bash disable=SC2034
# The addresses of a cluster, by address family. LIGHTERMAN_FAMILY is ipv4, ipv6 or dual. Sourced by
# up.sh, which has set NODES. Each list has an entry per family, the cluster's main family first.
# With `dual` the main family is IPv4.
FAMILY=${LIGHTERMAN_FAMILY:-ipv4}
HUB_IPS=() API_IPS=() DNS_IPS=() SERVICES=() REVERSE_ZONES=() DEFAULTS=()
case $FAMILY in ipv4 | dual)
  HUB_IPS+=(10.77.0.1) API_IPS+=(10.96.0.1) DNS_IPS+=(10.96.0.10) SERVICES+=(10.96.0.0/24) REVERSE_ZONES+=(10.in-addr.arpa) DEFAULTS+=('{"dst": "0.0.0.0/0"}')
  LOOPBACK=127.0.0.1 ANY=0.0.0.0 REGISTRY_LISTEN=10.77.0.1:5000
  ;;
esac
case $FAMILY in ipv6 | dual)
  HUB_IPS+=(fd77::1) API_IPS+=(fd96::1) DNS_IPS+=(fd96::10) SERVICES+=(fd96::/112) REVERSE_ZONES+=(ip6.arpa) DEFAULTS+=('{"dst": "::/0"}')
  ANY='::' REGISTRY_LISTEN=:5000
  [ "$FAMILY" = dual ] || LOOPBACK='[::1]' REGISTRY_LISTEN='[fd77::1]:5000'
  [ "$(cat /proc/sys/net/ipv6/conf/default/disable_ipv6 2> /dev/null)" = 0 ] || die "LIGHTERMAN_FAMILY=$FAMILY: this kernel has no IPv6, or has it disabled"
  ;;
esac
[ ${#HUB_IPS[@]} -gt 0 ] || die "LIGHTERMAN_FAMILY must be ipv4, ipv6 or dual, and is $FAMILY"
HUB_IP=${HUB_IPS[0]}

in_url() { if [[ $1 == *:* ]]; then echo "[$1]"; else echo "$1"; fi; } # in_url ADDRESS: the form for URLs
joined() { local IFS=,; echo "$*"; }
# ips_of NODE: the addresses of the node. The last part, as written, is 11 and up: fd77::11.
ips_of() {
  local i hub
  for i in "${!NODES[@]}"; do
    [ "${NODES[i]}" = "$1" ] || continue
    for hub in "${HUB_IPS[@]}"; do echo "${hub%1}$((11 + i))"; done
  done
}
ip_of() { local ip; read -r ip < <(ips_of "$1"); echo "$ip"; }
# pods_of ADDRESS: the pod network of the node with this address
pods_of() { if [[ $1 == *:* ]]; then echo "fd78:0:0:${1##*:}::/64"; else echo "10.78.${1##*.}.0/24"; fi; }
# add_address NETNS ADDRESS/LENGTH INTERFACE: adds an address without IPv6's duplicate address
# detection, which takes a second
add_address() { if [[ $2 == *:* ]]; then ip -n "$1" addr add "$2" dev "$3" nodad; else ip -n "$1" addr add "$2" dev "$3"; fi; }
whole_address() { if [[ $1 == *:* ]]; then echo "$1/128"; else echo "$1/32"; fi; }
node_link() { if [[ $1 == *:* ]]; then echo "$1/64"; else echo "$1/24"; fi; }
# routes_of NODE: routes of the node to Services and to other nodes' pods, as lines "NETWORK
# GATEWAY"
routes_of() {
  local i m other
  for i in "${!HUB_IPS[@]}"; do echo "${SERVICES[i]} ${HUB_IPS[i]}"; done
  for m in "${NODES[@]}"; do
    [ "$m" != "$1" ] || continue
    for other in $(ips_of "$m"); do echo "$(pods_of "$other") $other"; done
  done
}
# ranges_of NODE: the CNI plugin's address ranges for pods of the node
ranges_of() { local ip; for ip in $(ips_of "$1"); do printf '[{"subnet": "%s"}] ' "$(pods_of "$ip")"; done | sed 's/ $//; s/\] \[/], [/g'; }
