package gateway

import (
	"net/http"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
)

// dashboardPath is where the dashboard is in any case; "/" is too, unless a
// root session has it. OpenCode serves nothing below it: its API has /global,
// /session, /api and the like, and its web UI names folders in base64 of an
// absolute path, which begins with "L".
const dashboardPath = "/cloudcode/"

// buildHandler wires the whole front door.
func (g *Gateway) buildHandler() http.Handler {
	api, dashboard, proxy := g.apiHandler(), g.dashboardHandler(), g.newProxy()

	return g.observe(func(w http.ResponseWriter, r *http.Request) {
		host, path := hostname(r.Host), r.URL.EscapedPath()
		if !strings.HasPrefix(path, "/") {
			writeError(w, r, http.StatusBadRequest, problem{code: codes.InvalidArgument, reason: "BAD_PATH", message: "The path must begin with a slash."})
			return
		}
		d, known := byHost(host, g.bases)
		var prefix, rest string
		isOurs, isDashboard := false, false
		switch {
		case d.session != "" || !known:
		case path == "/healthz":
			writeHealth(w, true, "ok")
			return
		case path == "/readyz":
			g.ready(w)
			return
		case path == "/v1" || strings.HasPrefix(path, "/v1/"):
			var ok bool
			d, prefix, rest, ok = byPath(path)
			isOurs = !ok
		case path+"/" == dashboardPath || strings.HasPrefix(path, dashboardPath):
			isDashboard = true
		case g.cfg.RootSession != "":
			d = destination{session: g.cfg.RootSession, port: openCodePort}
		default:
			isDashboard = path == "/"
		}
		r, ok := g.guard(w, r, host, d)
		switch {
		case !ok:
		case isOurs:
			api.ServeHTTP(w, r)
		case isDashboard:
			dashboard.ServeHTTP(w, r)
		case d.session != "":
			proxy.serve(w, r, d, prefix, rest)
		case !known:
			writeError(w, r, http.StatusNotFound, problem{
				code: codes.NotFound, reason: "NOT_A_SESSION_HOST",
				message: "No session can have this host name. Sessions are at {id}." + g.cfg.BaseDomain + ", ports inside them at {port}--{id}." + g.cfg.BaseDomain + ".",
			})
		default:
			writeError(w, r, http.StatusNotFound, problem{
				code: codes.NotFound, reason: "NO_SUCH_PAGE",
				message: "There is nothing here. The dashboard is at /, the API at /v1/, sessions at {id}." + g.cfg.BaseDomain + ".",
			})
		}
	})
}

func (g *Gateway) ready(w http.ResponseWriter) {
	synced, connected := g.routes.status()
	switch {
	case !synced:
		writeHealth(w, false, "waiting for the server")
	case !connected:
		// Still of use: sessions are served from what is known.
		writeHealth(w, true, "ok; the server is away")
	default:
		writeHealth(w, true, "ok")
	}
}

func writeHealth(w http.ResponseWriter, ok bool, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = w.Write([]byte(text + "\n"))
}

// observe counts requests and writes the access log. Queries are left out of
// it: they may hold credentials.
func (g *Gateway) observe(next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.inFlight.add(1)
		defer g.inFlight.add(-1)
		rec := &recorder{ResponseWriter: w}
		start := time.Now()
		defer func() { // also when the proxy aborts by panicking
			g.log.DebugContext(r.Context(), "request", "method", r.Method, "host", r.Host, "path", r.URL.Path,
				"status", rec.status, "bytes", rec.bytes, "duration", time.Since(start), "remote", r.RemoteAddr)
		}()
		next(rec, r)
	})
}

// recorder remembers what was answered.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(p)
	r.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController flush, hijack and set deadlines.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }
