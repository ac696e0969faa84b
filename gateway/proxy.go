package gateway

import (
	"context"
	"errors"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	"github.com/cloudcode-dev/cloudcode/internal/container"
	"github.com/cloudcode-dev/cloudcode/internal/link"
)

// pageWait is how long a browser that opens a page waits for a session that
// starts, before it is shown how far it has come.
const pageWait = time.Second

// proxy passes requests on to sessions.
type proxy struct {
	g       *Gateway
	reverse *httputil.ReverseProxy
}

// proxied is what a request carries through ReverseProxy.
type proxied struct {
	d      destination
	route  *route
	up     *upstream
	prefix string // of a request by path, escaped
	rest   string // the path behind it, escaped
	from   origin
	cancel context.CancelFunc
}

type proxiedKey struct{}

func proxiedOf(r *http.Request) *proxied {
	p, _ := r.Context().Value(proxiedKey{}).(*proxied)
	return p
}

func (g *Gateway) newProxy() *proxy {
	p := &proxy{g: g}
	p.reverse = &httputil.ReverseProxy{
		Rewrite:        p.rewrite,
		Transport:      roundTripper{},
		FlushInterval:  -1, // nothing waits here
		ModifyResponse: p.modifyResponse,
		ErrorHandler:   p.fail,
		BufferPool:     &bufferPool{},
		ErrorLog:       g.quietLog(),
	}
	return p
}

// roundTripper uses the upstream of the request's session.
type roundTripper struct{}

func (roundTripper) RoundTrip(r *http.Request) (*http.Response, error) {
	return proxiedOf(r).up.transport.RoundTrip(r)
}

// serve passes a request on once its session runs, or says why it does not.
func (p *proxy) serve(w http.ResponseWriter, r *http.Request, d destination, prefix, rest string) {
	rt, ok := p.ready(w, r, d)
	if !ok {
		return
	}
	up := p.g.ups.get(rt)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	// A session that has moved has left its connections behind.
	defer context.AfterFunc(up.ctx, cancel)()
	from, _ := r.Context().Value(originKey{}).(origin)
	ctx = context.WithValue(ctx, proxiedKey{}, &proxied{
		d: d, route: rt, up: up, prefix: prefix, rest: rest, from: from, cancel: cancel,
	})
	p.reverse.ServeHTTP(w, r.WithContext(ctx))
}

// ready waits for the session to run, for a bounded time, and answers itself if
// it does not.
func (p *proxy) ready(w http.ResponseWriter, r *http.Request, d destination) (*route, bool) {
	wait := p.g.cfg.StartWait
	if wantsPage(r) {
		wait = min(wait, pageWait)
	}
	ctx, cancel := context.WithTimeout(r.Context(), wait)
	defer cancel()
	defer context.AfterFunc(p.g.draining, cancel)()
	settled := func(rt *route) bool {
		s := rt.session.GetState()
		return s != cloudcodev1.Session_PENDING && s != cloudcodev1.Session_STARTING
	}
	rt, synced := p.g.routes.await(ctx, d.session, func(rt *route, synced bool) bool {
		return rt == nil && synced || rt != nil && settled(rt)
	})
	if rt == nil && synced && p.isNew(ctx, d.session) {
		rt, _ = p.g.routes.await(ctx, d.session, func(rt *route, _ bool) bool { return rt != nil && settled(rt) })
	}
	switch {
	case r.Context().Err() != nil:
		return nil, false // nobody listens any more
	case rt == nil && !synced:
		w.Header().Set("Retry-After", "1")
		writeError(w, r, http.StatusServiceUnavailable, problem{
			code: codes.Unavailable, reason: "SERVER_UNAVAILABLE",
			message: "This gateway has just started and has not reached the server yet: try again in a moment.",
		})
		return nil, false
	case rt == nil:
		writeError(w, r, http.StatusNotFound, problem{
			code: codes.NotFound, reason: "SESSION_NOT_FOUND",
			message:  "There is no session " + d.session + ". `cloudcode session list` shows those that there are.",
			metadata: map[string]string{"session": d.session},
		})
		return nil, false
	case rt.running():
		return rt, true
	}
	p.notRunning(w, r, rt)
	return nil, false
}

// isNew asks the server about a session that this gateway has no route for. Who
// has just been told that it was created may be quicker than the route.
func (p *proxy) isNew(ctx context.Context, session string) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_, err := p.g.sessions.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: "sessions/" + session})
	return err == nil
}

// askTimeout bounds how long a request for an unknown session waits for the server.
const askTimeout = 2 * time.Second

// notRunning says what the session is doing instead.
func (p *proxy) notRunning(w http.ResponseWriter, r *http.Request, rt *route) {
	s := rt.session
	state := strings.TrimPrefix(s.GetState().String(), "STATE_")
	if s.GetState() == cloudcodev1.Session_DELETING {
		writeError(w, r, http.StatusNotFound, problem{
			code: codes.NotFound, reason: "SESSION_DELETING", message: "Session " + rt.id + " is being deleted.",
			metadata: map[string]string{"session": rt.id, "state": state},
		})
		return
	}
	asleep := s.GetState() == cloudcodev1.Session_SUSPENDED
	if !asleep { // or else it does not help
		w.Header().Set("Retry-After", "2")
	}
	resume := "Start it again with `cloudcode session resume " + rt.id + "`, or with Resume in the dashboard."
	if wantsPage(r) {
		pg := page{
			Session: rt.id, State: state, Reason: s.GetReason(), Message: s.GetMessage(),
			Detail: s.GetProgress().GetDetail(), Phase: s.GetProgress().GetPhase(), Reload: 2,
		}
		if total := s.GetProgress().GetTotalBytes(); total > 0 {
			pg.Percent = min(100, 100*s.GetProgress().GetCurrentBytes()/total)
			pg.HasPercent = true
		}
		switch s.GetState() {
		case cloudcodev1.Session_PENDING:
			pg.Title, pg.Busy = "Waiting for a node", true
		case cloudcodev1.Session_STARTING:
			pg.Title, pg.Busy = "Starting "+rt.id, true
		case cloudcodev1.Session_SUSPENDING:
			pg.Title, pg.Busy = rt.id+" is being suspended", true
		case cloudcodev1.Session_SUSPENDED:
			pg.Title, pg.Reload = rt.id+" is suspended", 0
			pg.Message = strings.TrimSpace(pg.Message + " " + resume)
			pg.Dashboard = p.g.baseURI.String() + dashboardPath + "#/sessions/" + rt.id
		case cloudcodev1.Session_FAILED:
			pg.Title = rt.id + " has failed"
		case cloudcodev1.Session_LOST:
			pg.Title = "The node of " + rt.id + " cannot be reached"
		default:
			pg.Title = rt.id + " is not running"
		}
		writePage(w, http.StatusServiceUnavailable, pg)
		return
	}
	message := "Session " + rt.id + " is " + state
	if s.GetReason() != "" {
		message += " (" + s.GetReason() + ")"
	}
	for _, more := range []string{s.GetMessage(), s.GetProgress().GetDetail()} {
		if more != "" {
			message += ": " + more
		}
	}
	if asleep {
		writeError(w, r, http.StatusServiceUnavailable, problem{
			code: codes.Unavailable, reason: "SESSION_SUSPENDED", message: message + ". " + resume,
			metadata: map[string]string{"session": rt.id, "state": state, "session_reason": s.GetReason()},
		})
		return
	}
	writeError(w, r, http.StatusServiceUnavailable, problem{
		code: codes.Unavailable, reason: "SESSION_NOT_RUNNING", message: message,
		metadata: map[string]string{"session": rt.id, "state": state, "session_reason": s.GetReason()},
	})
}

func (p *proxy) rewrite(pr *httputil.ProxyRequest) {
	x := proxiedOf(pr.In)
	out := pr.Out
	out.URL.Scheme = "http"
	// The name is for the connection pool only; the transport dials by link.
	out.URL.Host = x.route.id + ":" + strconv.Itoa(int(x.d.port))
	out.Host = pr.In.Host // what applications check Origin against
	// As it came: ReverseProxy would drop what Go cannot parse.
	out.URL.RawQuery = pr.In.URL.RawQuery
	out.Header.Del("X-Forwarded-Prefix") // ours to say, like the rest of X-Forwarded-*
	if x.prefix != "" {
		rest := x.rest
		if rest == "" {
			rest = "/"
		}
		if path, err := url.PathUnescape(rest); err == nil {
			out.URL.Path, out.URL.RawPath = path, rest
		}
		out.Header.Set("X-Forwarded-Prefix", x.prefix)
		// Cookies of the bare host are not the session's: it can set none here.
		out.Header.Del("Cookie")
	}
	pr.SetXForwarded()
	if p.g.baseURI.Scheme == "https" { // TLS ends in front of us
		out.Header.Set("X-Forwarded-Proto", "https")
	}
	if x.d.port == openCodePort { // guard has taken the user's own out
		out.SetBasicAuth(container.OpenCodeUser, x.route.password)
	}
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header.Set("User-Agent", "") // do not put Go's in
	}
}

// modifyResponse keeps sessions from reaching beyond their own origin.
func (p *proxy) modifyResponse(resp *http.Response) error {
	x := proxiedOf(resp.Request)
	h := resp.Header
	if x.d.port == openCodePort && resp.StatusCode == http.StatusUnauthorized {
		// Not the user's fault: asking him for a password would not help.
		h.Del("WWW-Authenticate")
	}
	switch x.from {
	case foreignOrigin, trustedOrigin: // ours are set already, or there are none
		for name := range h {
			if strings.HasPrefix(name, "Access-Control-") {
				h.Del(name)
			}
		}
	}
	// Orders to nginx or Apache in front of us: to serve a file of theirs instead.
	h.Del("X-Accel-Redirect")
	h.Del("X-Sendfile")
	// No cookies for the other sessions, and the dashboard, of the base domain.
	cookies := h["Set-Cookie"]
	for i, c := range cookies {
		cookies[i] = withoutDomain(c)
	}
	if x.d.port == openCodePort && h.Get("X-Frame-Options") == "" {
		h.Set("X-Frame-Options", "SAMEORIGIN") // no clicks meant for another page
	}
	if x.prefix != "" {
		confine(h, x.prefix)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols || strings.HasPrefix(h.Get("Content-Type"), "text/event-stream") {
		// No end of its own: it ends when we stop, and clients come back.
		context.AfterFunc(p.g.draining, x.cancel)
		if resp.StatusCode != http.StatusSwitchingProtocols {
			h.Set("X-Accel-Buffering", "no")
		}
	}
	return nil
}

// confine makes what a session serves below a path harmless to the origin that
// it shares with the API: a browser runs no script of it, and keeps nothing.
func confine(h http.Header, prefix string) {
	h.Add("Content-Security-Policy", "sandbox")
	h.Set("X-Content-Type-Options", "nosniff")
	for _, name := range []string{
		"Set-Cookie", "Clear-Site-Data", "Service-Worker-Allowed", "Strict-Transport-Security",
		// These would send the addresses of all requests to the origin elsewhere,
		// or the requests themselves.
		"Nel", "Report-To", "Reporting-Endpoints", "Alt-Svc",
	} {
		h.Del(name)
	}
	if loc := h.Get("Location"); strings.HasPrefix(loc, "/") && !strings.HasPrefix(loc, "//") {
		h.Set("Location", prefix+loc)
	}
}

// withoutDomain takes the Domain attribute out of a Set-Cookie value.
func withoutDomain(cookie string) string {
	parts := strings.Split(cookie, ";")
	kept := parts[:1]
	for _, attr := range parts[1:] {
		name, _, _ := strings.Cut(attr, "=")
		if !strings.EqualFold(strings.TrimSpace(name), "domain") {
			kept = append(kept, attr)
		}
	}
	return strings.Join(kept, ";")
}

// fail answers when nothing came back from the session.
func (p *proxy) fail(w http.ResponseWriter, r *http.Request, err error) {
	x := proxiedOf(r)
	pr := problem{code: codes.Unavailable, metadata: map[string]string{"session": x.route.id, "node": x.route.node}}
	name := "session " + x.route.id
	var dial *dialError
	switch {
	case x.up.ctx.Err() != nil:
		w.Header().Set("Retry-After", "1")
		pr.reason, pr.message = "SESSION_MOVED", "The "+name+" was restarted or moved while this request was under way: try again."
		if p.g.ctx.Err() != nil {
			pr.reason, pr.message = "GATEWAY_STOPPING", "This gateway is stopping: try again."
		}
	case r.Context().Err() != nil:
		return // the client has gone, or we are stopping and a stream was cut
	case errors.Is(err, link.ErrNoLink):
		w.Header().Set("Retry-After", "2")
		pr.reason, pr.message = "NODE_NOT_LINKED", "Node "+x.route.node+", which runs "+name+", is not connected to this gateway. Is its node daemon running, and can it reach "+p.g.LinkAddr()+"?"
	case errors.As(err, &dial):
		w.Header().Set("Retry-After", "1")
		text := dial.err.Error()
		if st, ok := status.FromError(dial.err); ok {
			text = st.Message()
		}
		pr.reason = "PORT_NOT_REACHABLE"
		pr.message = "Port " + strconv.Itoa(int(x.d.port)) + " of " + name + " cannot be reached: " + text
		pr.metadata["port"] = strconv.Itoa(int(x.d.port))
	default:
		pr.reason, pr.message = "SESSION_BROKE_OFF", "The connection to "+name+" broke off before it answered: "+err.Error()
	}
	p.g.log.DebugContext(r.Context(), "proxy", "session", x.route.id, "port", x.d.port, "error", err)
	writeError(w, r, http.StatusBadGateway, pr)
}

// bufferPool spares every response its own copy buffer.
type bufferPool struct{ pool sync.Pool }

func (b *bufferPool) Get() []byte {
	if v, ok := b.pool.Get().(*[]byte); ok {
		return *v
	}
	return make([]byte, 32<<10)
}

func (b *bufferPool) Put(p []byte) { b.pool.Put(&p) }
