package gateway

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/cloudcode-dev/cloudcode/internal/auth"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func basicAuth(user, pass string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+pass))
}

func TestAuth(t *testing.T) {
	hash, err := auth.HashPassword("pw")
	if err != nil {
		t.Fatal(err)
	}
	for name, password := range map[string]string{"plain": "pw", "hashed": hash} {
		t.Run(name, func(t *testing.T) {
			r := start(t, Config{Username: "ann", Password: password, Tokens: []string{"tok"}})
			r.linkNode()
			r.run("main", echo)
			for _, u := range []string{
				r.url("", "/"), r.url("", "/cloudcode/"), r.url("", "/v1/sessions"), r.url("", "/v1/openapi.json"),
				r.url("main.localhost", "/"), r.url("", "/v1/sessions/main/proxy/"),
			} {
				for _, c := range []struct {
					header, query string
					code          int
				}{
					{"", "", 401},
					{basicAuth("ann", "pw"), "", 200},
					{basicAuth("ann", "no"), "", 401},
					{basicAuth("bob", "pw"), "", 401},
					{"Basic x", "", 401},
					{"Bearer tok", "", 200},
					{"Bearer no", "", 401},
					{"", "?auth_token=" + base64.StdEncoding.EncodeToString([]byte("ann:pw")), 200},
					{"", "?auth_token=" + base64.RawURLEncoding.EncodeToString([]byte("ann:pw")), 200},
					{"", "?auth_token=" + base64.StdEncoding.EncodeToString([]byte("ann:no")), 401},
					{"", "?auth_token=tok", 401},
					{"", "?auth_token=", 401},
				} {
					var h []string
					if c.header != "" {
						h = []string{"Authorization", c.header}
					}
					a := r.get(u+c.query, h...)
					if a.code != c.code {
						t.Errorf("%s%s with %q: %d, want %d", u, c.query, c.header, a.code, c.code)
					}
					if c.code == 401 && a.h.Get("WWW-Authenticate") != `Basic realm="Agent"` {
						t.Errorf("%s: WWW-Authenticate %q", u, a.h.Get("WWW-Authenticate"))
					}
				}
			}
			// A query must not sign in what changes something.
			if a := r.do(http.MethodPost, r.url("main.localhost", "/?auth_token="+base64.StdEncoding.EncodeToString([]byte("ann:pw"))), nil); a.code != 401 {
				t.Errorf("POST with auth_token: %d", a.code)
			}
			for _, p := range []string{"/healthz", "/readyz"} {
				if a := r.get(r.url("", p)); a.code != 200 {
					t.Errorf("%s: %d", p, a.code)
				}
				if a := r.get(r.url("main.localhost", p)); a.code != 401 {
					t.Errorf("a session's %s needs no password", p)
				}
			}
			// The body is what was asked for.
			if a := r.get(r.url("", "/"), "Accept", "text/html"); !strings.HasPrefix(a.body, "<!doctype html>") {
				t.Errorf("%q", a.body)
			}
			if a := r.get(r.url("", "/"), "Accept", "text/plain"); strings.HasPrefix(a.body, "{") {
				t.Errorf("%q", a.body)
			}
			var st map[string]any
			if err := json.Unmarshal([]byte(r.get(r.url("", "/"), "Accept", "*/*").body), &st); err != nil || st["code"] != 16.0 {
				t.Errorf("%v %v", st, err)
			}
		})
	}
}

func TestOpenDoorNeedsLoopback(t *testing.T) {
	r := start(t, Config{})
	base := r.gw.cfg
	for _, c := range []struct {
		listen, password string
		anonymous, ok    bool
	}{
		{"127.0.0.1:0", "", false, true},
		{"localhost:0", "", false, true},
		{"[::1]:0", "", false, true},
		{":0", "", false, false},
		{"0.0.0.0:0", "", false, false},
		{"[::]:0", "", false, false},
		{"0.0.0.0:0", "", true, true},
		{"0.0.0.0:0", "pw", false, true},
		{"nonsense", "pw", false, false},
	} {
		cfg := base
		cfg.Listen, cfg.Password, cfg.AllowAnonymous = c.listen, c.password, c.anonymous
		g, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		err = g.Start(t.Context())
		if err == nil {
			if stopErr := g.Stop(t.Context()); stopErr != nil {
				t.Error(stopErr)
			}
		}
		if c.listen == "[::1]:0" && err != nil && strings.Contains(err.Error(), "assign requested address") {
			continue // a machine without IPv6
		}
		if (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestBadConfig(t *testing.T) {
	r := start(t, Config{})
	for name, change := range map[string]func(*Config){
		"hash":    func(c *Config) { c.Password = "$2b$10$x" },
		"root":    func(c *Config) { c.RootSession = "a--b" },
		"domain":  func(c *Config) { c.BaseDomain = "10.0.0.1" },
		"uri":     func(c *Config) { c.BaseURI = "example.com" },
		"path":    func(c *Config) { c.BaseURI = "http://example.com/x" },
		"origin":  func(c *Config) { c.TrustedOrigins = []string{"example.com"} },
		"server":  func(c *Config) { c.ServerConn = nil },
		"linktls": func(c *Config) { c.LinkTLS = nil },
	} {
		cfg := r.gw.cfg
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	cfg := r.gw.cfg
	cfg.LinkListen = "0.0.0.0:0"
	g, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "link-advertise") {
		t.Errorf("nodes are told to dial 0.0.0.0: %v", err)
	}
}

func TestRebinding(t *testing.T) {
	open := start(t, Config{BaseDomain: "agents.example.com", BaseURI: "https://front.example.com"})
	locked := start(t, Config{Password: "pw"})
	for host, ok := range map[string]bool{
		"localhost:8080": true, "127.0.0.1": true, "127.9.9.9:1": true, "[::1]:8080": true, "192.168.1.5:8080": true,
		"agents.example.com": true, "AGENTS.example.com.": true, "x.agents.example.com": true, "x.localhost": true, "front.example.com": true,
		"evil.example.com": false, "localhost.evil.com": false, "example.com": false, "xagents.example.com": false, "127.0.0.1.evil.com": false,
	} {
		for _, path := range []string{"/", "/v1/sessions"} {
			a := open.get("http://"+open.gw.Addr()+path, "Host", host)
			if (a.code != http.StatusForbidden) != ok {
				t.Errorf("Host %s%s: %d %s", host, path, a.code, a.body)
			}
			// With a password a name gives nothing away.
			if a := locked.get("http://"+locked.gw.Addr()+path, "Host", host); a.code != http.StatusUnauthorized {
				t.Errorf("with a password, Host %s: %d", host, a.code)
			}
		}
	}
}

func TestCrossOrigin(t *testing.T) {
	for name, cfg := range map[string]Config{"open": {}, "locked": {Username: "ann", Password: "pw"}} {
		t.Run(name, func(t *testing.T) {
			cfg.TrustedOrigins = []string{"https://app.example.com"}
			r := start(t, cfg)
			r.linkNode()
			r.run("main", echo)
			r.backend("main", 1, 3000, echo)
			own := func(host string) string { return strings.TrimSuffix(r.url(host, ""), "/") }
			for _, c := range []struct {
				target, origin, site string
				ok                   bool
			}{
				{"", "", "", true}, // curl, SDK, TUI
				{"", own(""), "same-origin", true},
				{"", own(""), "", true}, // an old browser
				{"", "", "same-origin", true},
				{"", "", "cross-site", false},
				{"", "https://evil.example.com", "cross-site", false},
				{"", "https://evil.example.com", "", false},
				{"", "null", "cross-site", false},
				{"", own("main.localhost"), "cross-site", false},
				{"", own("main.localhost"), "same-site", false},
				{"", "https://app.example.com", "cross-site", true},
				{"", "http://app.example.com", "cross-site", false},
				{"main.localhost", own("main.localhost"), "same-origin", true},
				{"main.localhost", own("other.localhost"), "same-site", false},
				{"main.localhost", own("3000--main.localhost"), "same-site", false},
				{"main.localhost", own(""), "same-site", false},
				{"3000--main.localhost", own("5173--main.localhost"), "same-site", true},
				{"3000--main.localhost", own("main.localhost"), "same-site", true},
				{"3000--main.localhost", own("5173--other.localhost"), "same-site", false},
			} {
				h := []string{"Authorization", basicAuth("ann", "pw"), "Content-Type", "text/plain"}
				if c.origin != "" {
					h = append(h, "Origin", c.origin)
				}
				if c.site != "" {
					h = append(h, "Sec-Fetch-Site", c.site)
				}
				path := "/"
				if c.target == "" {
					path = "/v1/sessions?sessionId=x"
				}
				a := r.do(http.MethodPost, r.url(c.target, path), strings.NewReader("{}"), h...)
				if (a.code == http.StatusOK) != c.ok || (!c.ok && a.code != http.StatusForbidden) {
					t.Errorf("POST to %q from %q (%q): %d %s", c.target, c.origin, c.site, a.code, a.body)
				}
				// What only reads is answered, but foreign pages cannot see it.
				if a := r.get(r.url(c.target, "/"), h...); a.code != http.StatusOK {
					t.Errorf("GET of %q from %q: %d", c.target, c.origin, a.code)
				} else if got := a.h.Get("Access-Control-Allow-Origin"); (got != "") != (c.origin == "https://app.example.com") {
					t.Errorf("GET of %q from %q: may be read by %q", c.target, c.origin, got)
				}
			}
			a := r.do(http.MethodOptions, r.url("", "/v1/sessions"), nil, "Origin", "https://app.example.com",
				"Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "authorization,content-type")
			if a.code != http.StatusNoContent || a.h.Get("Access-Control-Allow-Headers") != "authorization,content-type" {
				t.Errorf("preflight of a trusted origin: %d %v", a.code, a.h)
			}
			a = r.do(http.MethodOptions, r.url("", "/v1/sessions"), nil, "Origin", "https://evil.example.com", "Access-Control-Request-Method", "POST")
			if a.h.Get("Access-Control-Allow-Origin") != "" || a.code == http.StatusNoContent {
				t.Errorf("preflight of a foreign origin: %d %v", a.code, a.h)
			}
		})
	}
}

func TestApplicationsKeepTheirAuthorizationWhereWeAskForNone(t *testing.T) {
	r := start(t, Config{})
	r.linkNode()
	r.run("main", echo)
	r.backend("main", 1, 3000, echo)
	if e := decode(t, r.get(r.url("3000--main.localhost", "/?auth_token=mine"), "Authorization", "Bearer app")); e.Headers.Get("Authorization") != "Bearer app" || e.URI != "/?auth_token=mine" {
		t.Errorf("%+v", e)
	}
	e := decode(t, r.get(r.url("main.localhost", "/?auth_token=mine"), "Authorization", "Bearer app"))
	if _, pass, _ := (&http.Request{Header: e.Headers}).BasicAuth(); pass != "inner-main" || e.URI != "/" {
		t.Errorf("%+v", e)
	}
}

func TestCutAuthToken(t *testing.T) {
	for in, want := range map[string][2]string{
		"":                          {"", ""},
		"a=1&b=%zz;":                {"", "a=1&b=%zz;"},
		"auth_token=x":              {"x", ""},
		"a&auth_token=x%3D&b":       {"x=", "a&b"},
		"auth_token=a+b":            {"a+b", ""},
		"%61uth_token=x&a=1":        {"x", "a=1"},
		"auth_token=x&auth_token=y": {"x", ""},
		"xauth_token=1":             {"", "xauth_token=1"},
	} {
		if token, rest := cutAuthToken(in); token != want[0] || rest != want[1] {
			t.Errorf("%q → %q, %q", in, token, rest)
		}
	}
}

func TestDashboardRunsNothingButItself(t *testing.T) {
	r := start(t, Config{})
	a := r.get(r.url("", "/"))
	csp := a.h.Get("Content-Security-Policy")
	for _, tag := range []string{"style", "script"} {
		_, rest, ok := strings.Cut(a.body, "<"+tag+">")
		text, _, closed := strings.Cut(rest, "</"+tag+">")
		if !ok || !closed || !strings.Contains(csp, tag+"-src "+digestOf(text)) {
			t.Errorf("the page's own %s is not what the policy names", tag)
		}
	}
	for _, bad := range []string{"unsafe", "http:", "https:", "*"} {
		if strings.Contains(csp, bad) {
			t.Errorf("policy allows %s: %s", bad, csp)
		}
	}
	for _, bad := range []string{" src=", " onclick=", " style=", "innerHTML", "@import"} {
		if strings.Contains(a.body, bad) {
			t.Errorf("the page uses %q", bad)
		}
	}
	rt := session("main", cloudcodev1.Session_FAILED, 1)
	r.put(rt)
	a = r.get(r.url("main.localhost", "/"), "Accept", "text/html")
	_, rest, _ := strings.Cut(a.body, "<style>")
	text, _, _ := strings.Cut(rest, "</style>")
	if !strings.Contains(a.h.Get("Content-Security-Policy"), digestOf(text)) {
		t.Error("the status page's style is not what its policy names")
	}
	if a := r.do(http.MethodPost, r.url("", "/"), nil); a.code != http.StatusMethodNotAllowed {
		t.Errorf("POST /: %d", a.code)
	}
}
