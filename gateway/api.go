package gateway

import (
	"context"
	"log"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/proto/openapi"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
)

const (
	// maxBody bounds a request of the API, in bytes.
	maxBody = 4 << 20
	// unaryTimeout bounds a call to the server.
	unaryTimeout = 30 * time.Second
	// savingTimeout bounds one that answers once a session is in object storage,
	// or once a bucket has been read.
	savingTimeout = 10 * time.Minute
)

// marshal writes what the OpenAPI document says: lowerCamelCase names. Empty
// lists, strings and zeros are written, so that programs find them; messages
// that are not set are left out.
var marshal = protojson.MarshalOptions{EmitDefaultValues: true}

// apiHandler serves /v1/.
func (g *Gateway) apiHandler() http.Handler {
	mux := runtime.NewServeMux(
		runtime.WithMarshalerOption(runtime.MIMEWildcard, &runtime.JSONPb{
			MarshalOptions: marshal,
			// A name that is not known is a mistake that the user wants to hear of.
			UnmarshalOptions: protojson.UnmarshalOptions{},
		}),
		runtime.WithDisablePathLengthFallback(),
		runtime.WithDisableHTTPMethodOverride(),
		// No header of a request becomes metadata, and no metadata a header.
		runtime.WithIncomingHeaderMatcher(noHeader),
		runtime.WithOutgoingHeaderMatcher(noHeader),
		runtime.WithOutgoingTrailerMatcher(noHeader),
		runtime.WithErrorHandler(g.apiError),
	)
	ctx := context.Background() // of the registration; calls have their request's
	must(cloudcodev1.RegisterSessionServiceHandlerClient(ctx, mux, g.sessions))
	must(cloudcodev1.RegisterNodeServiceHandlerClient(ctx, mux, cloudcodev1.NewNodeServiceClient(g.cfg.ServerConn)))
	must(cloudcodev1.RegisterStorageServiceHandlerClient(ctx, mux, cloudcodev1.NewStorageServiceClient(g.cfg.ServerConn)))

	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		path := r.URL.EscapedPath()
		if path == "/v1/openapi.json" {
			h.Set("Content-Type", "application/json")
			h.Set("Content-Length", strconv.Itoa(len(openapi.Document)))
			_, _ = w.Write(openapi.Document)
			return
		}
		if id, kind, ok := strings.Cut(strings.TrimPrefix(path, "/v1/sessions/"), "/"); ok {
			switch r.Method + " " + kind {
			case "GET events":
				g.serveEvents(w, r, "sessions/"+id)
				return
			case "GET logs":
				g.serveLogs(w, r, "sessions/"+id)
				return
			case "GET archive":
				g.readArchive(w, r, "sessions/"+id)
				return
			case "PUT archive":
				g.writeArchive(w, r, "sessions/"+id)
				return
			}
		}
		if r.ContentLength > maxBody {
			writeError(w, r, http.StatusRequestEntityTooLarge, problem{
				code: codes.InvalidArgument, reason: "REQUEST_TOO_LARGE", message: "A request may have at most 4 MiB.",
			})
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		if r.Method == http.MethodPatch {
			r = withProtoMask(r)
		}
		ctx, cancel := context.WithTimeout(r.Context(), timeoutOf(path))
		defer cancel()
		mux.ServeHTTP(w, r.WithContext(ctx))
	})
}

// timeoutOf returns how long a call may take.
func timeoutOf(path string) time.Duration {
	switch verb := path[strings.LastIndexByte(path, '/')+1:]; verb[strings.LastIndexByte(verb, ':')+1:] {
	case "checkpoint", "restore", "fork", "recover":
		return savingTimeout
	}
	if strings.HasPrefix(path, "/v1/storageProfiles/") {
		return savingTimeout
	}
	return unaryTimeout
}

// withProtoMask puts the names in a query's updateMask as the server knows them.
// In JSON a mask has lowerCamelCase names; grpc-gateway translates those in a
// body, but not in a query. Keys of maps stay as they are.
func withProtoMask(r *http.Request) *http.Request {
	q := r.URL.Query()
	masks := append(q["updateMask"], q["update_mask"]...)
	if len(masks) == 0 {
		return r
	}
	for i, mask := range masks {
		paths := strings.Split(mask, ",")
		for j, path := range paths {
			segments := strings.Split(strings.TrimSpace(path), ".")
			for k, s := range segments {
				segments[k] = toSnake(s)
				if s == "labels" || s == "env" || segments[k] == "node_selector" {
					break
				}
			}
			paths[j] = strings.Join(segments, ".")
		}
		masks[i] = strings.Join(paths, ",")
	}
	q.Del("update_mask")
	q.Set("updateMask", strings.Join(masks, ","))
	r = r.Clone(r.Context())
	r.URL.RawQuery = q.Encode()
	return r
}

func toSnake(s string) string {
	var b strings.Builder
	for _, c := range s {
		if c >= 'A' && c <= 'Z' {
			b.WriteByte('_')
			c += 'a' - 'A'
		}
		b.WriteRune(c)
	}
	return b.String()
}

// must is for registrations, which fail for patterns only.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

func noHeader(string) (string, bool) { return "", false }

// apiError answers with google.rpc.Status.
func (g *Gateway) apiError(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, err error) {
	g.writeStatus(w, r, err)
}

// writeStatus answers with the error of a call to the server.
func (g *Gateway) writeStatus(w http.ResponseWriter, r *http.Request, err error) {
	st := status.Convert(err)
	code := runtime.HTTPStatusFromCode(st.Code())
	h := w.Header()
	switch {
	case st.Code() == codes.Unavailable && grpcerr.Reason(err) == "":
		// Not said by the server: it was not reached.
		g.log.DebugContext(r.Context(), "call the server", "error", err)
		h.Set("Retry-After", "1")
		writeError(w, r, code, problem{
			code: codes.Unavailable, reason: "SERVER_UNAVAILABLE",
			message: "The server cannot be reached; it may be restarting. Sessions go on. Try again in a moment.",
		})
		return
	case st.Code() == codes.Unavailable || st.Code() == codes.ResourceExhausted:
		h.Set("Retry-After", "2")
	case st.Code() == codes.Unauthenticated:
		// The user is known already: it is the gateway that the server refuses.
		g.log.ErrorContext(r.Context(), "the server refuses this gateway", "error", err)
		writeError(w, r, http.StatusBadGateway, problem{
			code: codes.Internal, reason: "GATEWAY_REFUSED", message: "The server refuses this gateway: " + st.Message(),
		})
		return
	case st.Code() == codes.Unimplemented && len(st.Details()) == 0 && st.Message() == http.StatusText(http.StatusMethodNotAllowed):
		code = http.StatusMethodNotAllowed // grpc-gateway's own
	}
	body, merr := protojson.Marshal(st.Proto())
	if merr != nil {
		body = []byte(`{"code":13,"message":"internal error"}`)
	}
	body = append(compact(body), '\n')
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(code)
	_, _ = w.Write(body) // a client that is gone needs no answer
}

// quietLog keeps what libraries complain about (clients that went away) out of
// the way.
func (g *Gateway) quietLog() *log.Logger { return slog.NewLogLogger(g.log.Handler(), slog.LevelDebug) }
