package gateway

import (
	"strings"
	"testing"
)

func TestHosts(t *testing.T) {
	bases := []string{"agents.example.com", "localhost"}
	for _, c := range []struct {
		host    string
		session string
		port    uint16
		ok      bool
	}{
		{"localhost", "", 0, true},
		{"localhost:8080", "", 0, true},
		{"127.0.0.1:8080", "", 0, true},
		{"[::1]:8080", "", 0, true},
		{"[::1]", "", 0, true},
		{"agents.example.com", "", 0, true},
		{"example.com", "", 0, true},
		{"notagents.example.com", "", 0, true},
		{"", "", 0, true},
		{"main.localhost:8080", "main", 2633, true},
		{"MAIN.LocalHost:8080", "main", 2633, true},
		{"main.localhost.:8080", "main", 2633, true},
		{"main.localhost.", "main", 2633, true},
		{"main.agents.example.com", "main", 2633, true},
		{"3000--main.agents.example.com:443", "main", 3000, true},
		{"1--a.localhost", "a", 1, true},
		{"65535--a-b.localhost", "a-b", 65535, true},
		{"2633--main.localhost", "main", 2633, true},
		{"0--main.localhost", "", 0, false},
		{"65536--main.localhost", "", 0, false},
		{"080--main.localhost", "", 0, false},
		{"+80--main.localhost", "", 0, false},
		{"--main.localhost", "", 0, false},
		{"x--main.localhost", "", 0, false},
		{"80--.localhost", "", 0, false},
		{"80--a--b.localhost", "", 0, false},
		{"a.b.localhost", "", 0, false},
		{"-a.localhost", "", 0, false},
		{"a-.localhost", "", 0, false},
		{"a_b.localhost", "", 0, false},
		{".localhost", "", 0, false},
		{strings.Repeat("a", 40) + ".localhost", strings.Repeat("a", 40), 2633, true},
		{strings.Repeat("a", 41) + ".localhost", "", 0, false},
	} {
		d, ok := byHost(hostname(c.host), bases)
		if ok != c.ok || d.session != c.session || d.port != c.port {
			t.Errorf("%q → %+v, %v; want %q port %d, %v", c.host, d, ok, c.session, c.port, c.ok)
		}
	}
}

func TestHostname(t *testing.T) {
	for in, want := range map[string]string{
		"A.B:80": "a.b", "a.b.": "a.b", "a:": "a", "[::1]:80": "::1", "[FE80::1]": "fe80::1",
		"::1": "", "a:b": "", "a:80:80": "", "[::1": "", "[::1]x": "", "[a]": "", "[127.0.0.1]": "", "a:99999": "", "a:-1": "",
	} {
		if got := hostname(in); got != want {
			t.Errorf("hostname(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestPaths(t *testing.T) {
	for _, c := range []struct {
		path, session string
		port          uint16
		prefix, rest  string
		ok            bool
	}{
		{"/v1/sessions/main/proxy/", "main", 2633, "/v1/sessions/main/proxy", "/", true},
		{"/v1/sessions/main/proxy", "main", 2633, "/v1/sessions/main/proxy", "", true},
		{"/v1/sessions/main/proxy/a%2Fb//c/..", "main", 2633, "/v1/sessions/main/proxy", "/a%2Fb//c/..", true},
		{"/v1/sessions/main/ports/3000/x", "main", 3000, "/v1/sessions/main/ports/3000", "/x", true},
		{"/v1/sessions/main/ports/3000", "main", 3000, "/v1/sessions/main/ports/3000", "", true},
		{"/v1/sessions/main/ports/0/x", "", 0, "", "", false},
		{"/v1/sessions/main/ports//x", "", 0, "", "", false},
		{"/v1/sessions/ma%69n/proxy/x", "", 0, "", "", false},
		{"/v1/sessions//proxy/x", "", 0, "", "", false},
		{"/v1/sessions/main", "", 0, "", "", false},
		{"/v1/sessions/main/events", "", 0, "", "", false},
		{"/v1/sessions/main/proxyx/", "", 0, "", "", false},
		{"/v1/sessions/../proxy/", "", 0, "", "", false},
	} {
		d, prefix, rest, ok := byPath(c.path)
		if ok != c.ok || d.session != c.session || d.port != c.port || prefix != c.prefix || rest != c.rest {
			t.Errorf("%q → %+v %q %q %v", c.path, d, prefix, rest, ok)
		}
	}
}

func FuzzHost(f *testing.F) {
	for _, s := range []string{"main.localhost:1", "3000--main.localhost", "[::1]:3", "a--b.c.", "1--" + strings.Repeat("a", 40) + ".localhost"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h := hostname(s)
		d, ok := byHost(h, []string{"localhost"})
		if d.session == "" {
			if d.port != 0 {
				t.Errorf("%q: a port of nothing", s)
			}
			if ok && strings.HasSuffix(h, ".localhost") {
				t.Errorf("%q: taken for the gateway itself", s)
			}
			return
		}
		if !ok || !validSessionID(d.session) || d.port == 0 || len(d.session) > 40 {
			t.Errorf("%q → %+v, %v", s, d, ok)
		}
	})
}
