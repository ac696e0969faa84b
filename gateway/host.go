package gateway

import (
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/cloudcode-dev/cloudcode/internal/container"
)

// openCodePort is where OpenCode listens in every session's container.
const openCodePort = container.OpenCodePort

// destination is what a request is for: the gateway itself (no session), or a
// port of a session.
type destination struct {
	session string
	port    uint16
}

var sessionID = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$`)

func validSessionID(id string) bool {
	return sessionID.MatchString(id) && !strings.Contains(id, "--")
}

// hostname returns a Host header's name: lower case, without port, brackets and
// trailing dot. It returns "" for what is no host.
func hostname(hostport string) string {
	host := hostport
	switch {
	case strings.HasPrefix(host, "["):
		end := strings.IndexByte(host, ']')
		if end < 0 || (end+1 < len(host) && !validPort(host[end+1:])) {
			return ""
		}
		host = host[1:end]
		if addr, err := netip.ParseAddr(host); err != nil || !addr.Is6() {
			return ""
		}
		return strings.ToLower(host)
	case strings.Count(host, ":") == 1:
		i := strings.IndexByte(host, ':')
		if !validPort(host[i:]) {
			return ""
		}
		host = host[:i]
	case strings.Contains(host, ":"):
		return ""
	}
	return strings.TrimSuffix(strings.ToLower(host), ".")
}

// validPort checks ":" or ":123".
func validPort(s string) bool {
	if !strings.HasPrefix(s, ":") {
		return false
	}
	_, err := strconv.ParseUint(s[1:], 10, 16)
	return s == ":" || err == nil
}

// parsePort reads a port as it stands in a host name or path: one spelling only.
func parsePort(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != s {
		return 0, false
	}
	return uint16(n), true
}

// byHost says where a request with this (normalised) host name goes.
// `{id}.base` is a session's OpenCode, `{port}--{id}.base` a port inside it, and
// everything that is not below a base domain the gateway itself. ok is false
// for a name below a base domain that can be no session's.
func byHost(host string, bases []string) (d destination, ok bool) {
	for _, base := range bases {
		label, below := strings.CutSuffix(host, "."+base)
		if !below {
			continue
		}
		d.port = openCodePort
		if port, id, has := strings.Cut(label, "--"); has {
			if d.port, ok = parsePort(port); !ok {
				return destination{}, false
			}
			label = id
		}
		if !validSessionID(label) {
			return destination{}, false
		}
		d.session = label
		return d, true
	}
	return destination{}, true
}

// byPath takes `/v1/sessions/{id}/proxy/…` and `/v1/sessions/{id}/ports/{port}/…`
// apart. path is escaped, and so are prefix and rest; rest begins with "/" or is
// empty. ok is false for any other path.
func byPath(path string) (d destination, prefix, rest string, ok bool) {
	after, found := strings.CutPrefix(path, "/v1/sessions/")
	if !found {
		return d, "", "", false
	}
	id, after, _ := strings.Cut(after, "/")
	kind, after, slash := strings.Cut(after, "/")
	d = destination{session: id, port: openCodePort}
	prefix = "/v1/sessions/" + id + "/" + kind
	switch kind {
	case "proxy":
	case "ports":
		var port string
		port, after, slash = strings.Cut(after, "/")
		if d.port, ok = parsePort(port); !ok {
			return destination{}, "", "", false
		}
		prefix += "/" + port
	default:
		return destination{}, "", "", false
	}
	if !validSessionID(id) {
		return destination{}, "", "", false
	}
	if slash {
		rest = "/" + after
	}
	return d, prefix, rest, true
}

// isLoopback reports whether a normalised host name can only mean this machine.
func isLoopback(host string) bool {
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
