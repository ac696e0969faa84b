package objstore

import (
	"fmt"
	"net/netip"
	"syscall"
)

// addressError: a connection that PublicOnly forbids.
type addressError struct{ addr netip.Addr }

func (e *addressError) Error() string { return fmt.Sprintf("%s is no public address", e.addr) }

// publicOnly is net.Dialer.Control: it sees the very address that is connected to,
// whatever a name led to a moment ago.
func publicOnly(_, address string, _ syscall.RawConn) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if !IsPublic(a.Addr()) {
		return &addressError{a.Addr()}
	}
	return nil
}

var (
	nat64  = netip.MustParsePrefix("64:ff9b::/96")
	global = netip.MustParsePrefix("2000::/3")
	// special are those of IANA's registries that look like public ones.
	special = prefixes(
		"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
		"192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
		"224.0.0.0/4", "240.0.0.0/4",
		"168.63.129.16/32", // Azure's metadata service
		"2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
	)
)

func prefixes(all ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(all))
	for i, p := range all {
		out[i] = netip.MustParsePrefix(p)
	}
	return out
}

// IsPublic says whether an address is one of the public internet. All others may
// lead to what a machine keeps for itself or its network: its own services, those of
// its neighbours, a cloud's metadata.
func IsPublic(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if nat64.Contains(a) { // an IPv4 address, reached through a gateway
		b := a.As16()
		a = netip.AddrFrom4([4]byte(b[12:]))
	}
	if !a.IsValid() || a.Is6() && !global.Contains(a) {
		return false
	}
	for _, p := range special {
		if p.Contains(a) {
			return false
		}
	}
	return true
}
