package gateway

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/auth"
)

// policy decides which browsers' requests are to be believed. Programs send
// neither Origin nor Sec-Fetch-Site and are bound by credentials alone.
type policy struct {
	bases   []string
	trusted map[string]bool // origins
	hosts   map[string]bool // names we go by
	anyHost bool            // credentials are asked for: see hostAllowed
}

func newPolicy(cfg Config, bases []string, baseURI *url.URL, authOn bool) (*policy, error) {
	p := &policy{bases: bases, trusted: map[string]bool{}, hosts: map[string]bool{}, anyHost: authOn}
	// The library's check of an origin's form.
	check := http.NewCrossOriginProtection()
	for _, o := range cfg.TrustedOrigins {
		o = strings.TrimSuffix(strings.TrimSpace(o), "/")
		if err := check.AddTrustedOrigin(o); err != nil {
			return nil, errors.New("trusted origin " + o + " must look like https://app.example.com")
		}
		p.trusted[strings.ToLower(o)] = true
	}
	if baseURI != nil {
		p.hosts[hostname(baseURI.Host)] = true
	}
	p.hosts[hostname(cfg.Listen)] = true
	delete(p.hosts, "")
	return p, nil
}

// hostAllowed stops DNS rebinding: a page of evil.example whose name suddenly
// means 127.0.0.1 would be of one origin with us. Where credentials are asked
// for it gains nothing, because browsers keep them by origin. Addresses cannot
// be rebound.
func (p *policy) hostAllowed(host string) bool {
	if p.anyHost || isLoopback(host) || p.hosts[host] {
		return true
	}
	for _, base := range p.bases {
		if host == base || strings.HasSuffix(host, "."+base) {
			return true
		}
	}
	_, err := netip.ParseAddr(host)
	return err == nil
}

// origin is what a request's headers say about the page that sent it.
type origin int

const (
	sameOrigin    origin = iota // our own page, or no browser
	trustedOrigin               // configured
	siblingOrigin               // another port of the same session
	foreignOrigin
)

// originOf judges the page that sent r to d.
func (p *policy) originOf(r *http.Request, d destination) origin {
	from := r.Header.Get("Origin")
	if from == "" {
		switch r.Header.Get("Sec-Fetch-Site") {
		case "", "same-origin", "none":
			return sameOrigin
		}
		return foreignOrigin
	}
	if p.trusted[strings.ToLower(from)] {
		return trustedOrigin
	}
	u, err := url.Parse(from)
	if err != nil || u.Host == "" { // "null" too: sandboxed pages, files
		return foreignOrigin
	}
	if strings.EqualFold(u.Host, r.Host) {
		// Also when the schemes differ, as behind a proxy that ends TLS; who
		// can tell says so in Sec-Fetch-Site.
		switch r.Header.Get("Sec-Fetch-Site") {
		case "", "same-origin", "none":
			return sameOrigin
		}
		return foreignOrigin
	}
	// A dev server's page may call its backend on another port of its session.
	// OpenCode itself is for its own pages only.
	if d.session != "" && d.port != openCodePort {
		if src, ok := byHost(hostname(u.Host), p.bases); ok && src.session == d.session {
			return siblingOrigin
		}
	}
	return foreignOrigin
}

func isSafe(method string) bool {
	return method == http.MethodGet || method == http.MethodHead || method == http.MethodOptions
}

func isUpgrade(r *http.Request) bool {
	for _, v := range r.Header.Values("Connection") {
		for token := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(token), "upgrade") {
				return true
			}
		}
	}
	return false
}

func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Origin") != "" && r.Header.Get("Access-Control-Request-Method") != ""
}

// guard checks Host, origin and credentials, in this order, and answers itself
// when one of them does not do. It returns the request to go on with.
func (g *Gateway) guard(w http.ResponseWriter, r *http.Request, host string, d destination) (*http.Request, bool) {
	if !g.policy.hostAllowed(host) {
		writeError(w, r, http.StatusForbidden, problem{
			code: codes.PermissionDenied, reason: "HOST_NOT_ALLOWED",
			message: "This gateway does not go by the name in the Host header. Without a password it answers to localhost, its base domain and addresses only; set --base-domain or a password.",
		})
		return nil, false
	}
	from := g.policy.originOf(r, d)
	if from == trustedOrigin || from == siblingOrigin {
		// Browsers send no credentials with a preflight, so it can only be
		// answered here; without credentials a sibling's is the session's to
		// answer, as is in any case who may read what.
		preflight := isPreflight(r) && (from == trustedOrigin || g.verify.Enabled())
		h := w.Header()
		if preflight || from == trustedOrigin {
			allowOrigin(h, r.Header.Get("Origin"))
		}
		if preflight {
			h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE")
			h.Set("Access-Control-Allow-Headers", r.Header.Get("Access-Control-Request-Headers"))
			h.Set("Access-Control-Max-Age", "600")
			w.WriteHeader(http.StatusNoContent)
			return nil, false
		}
	}
	if from == foreignOrigin && (!isSafe(r.Method) || isUpgrade(r)) {
		writeError(w, r, http.StatusForbidden, problem{
			code: codes.PermissionDenied, reason: "ORIGIN_NOT_ALLOWED",
			message: "A page of another origin must not do this. If it is meant to, start the gateway with its origin as --trusted-origin.",
		})
		return nil, false
	}
	err := g.authenticate(r)
	switch {
	case errors.Is(err, auth.ErrBusy):
		w.Header().Set("Retry-After", "1")
		writeError(w, r, http.StatusServiceUnavailable, problem{
			code: codes.Unavailable, reason: "SIGN_IN_BUSY", message: "Too many sign-ins at the same time: try again.",
		})
		return nil, false
	case err != nil:
		w.Header().Set("WWW-Authenticate", `Basic realm="Agent"`)
		writeError(w, r, http.StatusUnauthorized, problem{
			code: codes.Unauthenticated, reason: "UNAUTHENTICATED",
			message: "User name and password are missing or wrong (SERVER_USERNAME and SERVER_PASSWORD of the gateway).",
		})
		return nil, false
	}
	// From here on nobody sees the credentials: not the session, not the server.
	// The query's token goes where it is ours: when it was good, and always on
	// the way to OpenCode, which would look at it before our own header.
	r = r.WithContext(context.WithValue(r.Context(), originKey{}, from))
	token, rest := cutAuthToken(r.URL.RawQuery)
	ours := token != "" && (d.session == "" || d.port == openCodePort || (g.verify.Enabled() && g.checkToken(token) == nil))
	// Where nothing is asked for, an Authorization header is meant for the
	// application on the session's port, and is not ours to take.
	theirs := !g.verify.Enabled() && d.session != "" && d.port != openCodePort
	if (r.Header.Get("Authorization") != "" && !theirs) || ours {
		r = r.Clone(r.Context())
		if !theirs {
			r.Header.Del("Authorization")
		}
		if ours {
			r.URL.RawQuery = rest
			r.RequestURI = ""
		}
	}
	// A page that was opened with a token has it in its address.
	if ref, query, ok := strings.Cut(r.Header.Get("Referer"), "?"); ok && g.verify.Enabled() {
		if token, rest := cutAuthToken(query); token != "" {
			r = r.Clone(r.Context())
			r.Header.Set("Referer", strings.TrimSuffix(ref+"?"+rest, "?"))
		}
	}
	return r, true
}

type originKey struct{}

// authenticate checks Basic or Bearer credentials in the header or, for GET,
// `auth_token=base64(user:password)` in the query: that is how OpenCode's
// clients sign in where they cannot set headers, for WebSockets and
// EventSource. It is not taken for other methods, so that no form or link can
// carry credentials to something that changes anything.
func (g *Gateway) authenticate(r *http.Request) error {
	if !g.verify.Enabled() {
		return nil
	}
	err := auth.ErrDenied
	if h := r.Header.Get("Authorization"); h != "" {
		if err = g.verify.CheckHeader(h); err == nil {
			return nil
		}
	}
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		if token, _ := cutAuthToken(r.URL.RawQuery); token != "" {
			return g.checkToken(token)
		}
	}
	return err
}

func (g *Gateway) checkToken(token string) error {
	user, pass, ok := auth.DecodeBasic(token)
	if !ok {
		return auth.ErrDenied
	}
	return g.verify.CheckBasic(user, pass)
}

// cutAuthToken takes auth_token out of a query and leaves every other byte as it is.
func cutAuthToken(query string) (token, rest string) {
	if !strings.Contains(query, "auth") && !strings.Contains(query, "%") {
		return "", query
	}
	var kept []string
	for part := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(part, "=")
		if n, err := url.QueryUnescape(name); err == nil && n == "auth_token" {
			// "+" is a digit of base64, and some clients do not escape it.
			if v, err := url.PathUnescape(value); err == nil && token == "" {
				token = v
			}
			continue
		}
		kept = append(kept, part)
	}
	return token, strings.Join(kept, "&")
}

// allowOrigin lets a page of another origin read the answer.
func allowOrigin(h http.Header, origin string) {
	h.Set("Access-Control-Allow-Origin", origin)
	h.Set("Access-Control-Allow-Credentials", "true")
	h.Add("Vary", "Origin")
}
