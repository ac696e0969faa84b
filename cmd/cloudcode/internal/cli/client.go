package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/pki"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// Files that a server on this machine leaves below its data directory.
const (
	addressFile = "server/address"
	tokenFile   = "server/token"
	caFile      = "pki/ca.crt"
)

// client is a connection to the server.
type client struct {
	sessions cloudcodev1.SessionServiceClient
	nodes    cloudcodev1.NodeServiceClient
	storage  cloudcodev1.StorageServiceClient

	conn     *grpc.ClientConn
	target   target
	tls      *tlsRecorder
	deadline time.Duration
	pace     pacing
}

// target is a server and what is shown to it.
type target struct {
	address string
	local   bool // found by itself: a server on this machine
	roots   *x509.CertPool
	header  string // authorization; empty: none
	note    string // why there are no better credentials
}

// dial prepares a connection; it is made by the first call. Close it.
func dial(cmd *cobra.Command) (*client, error) {
	t, err := findTarget(cmd)
	if err != nil {
		return nil, err
	}
	timeout, err := cmd.Flags().GetDuration("request-timeout")
	if err != nil {
		return nil, err
	}
	if timeout <= 0 {
		return nil, usagef("--request-timeout %s: want more than 0", timeout)
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: t.roots}
	if t.local {
		// Whatever name it is reached by, it must be the fleet's server.
		cfg.ServerName = pki.ServerName
	}
	rec := &tlsRecorder{TransportCredentials: credentials.NewTLS(cfg)}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(rec),
		grpc.WithUserAgent("cloudcode-cli/" + cmd.Root().Version),
		// gRPC's own pauses grow to two minutes; people wait for this.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20)),
	}
	if t.header != "" {
		opts = append(opts, grpc.WithPerRPCCredentials(authorization(t.header)))
	}
	conn, err := grpc.NewClient("dns:///"+t.address, opts...)
	if err != nil {
		return nil, usagef("--server %q: %w", t.address, err)
	}
	return &client{
		sessions: cloudcodev1.NewSessionServiceClient(conn), nodes: cloudcodev1.NewNodeServiceClient(conn),
		storage: cloudcodev1.NewStorageServiceClient(conn),
		conn:    conn, target: t, tls: rec, deadline: timeout, pace: defaultPacing,
	}, nil
}

func (c *client) close() { _ = c.conn.Close() }

// withClient runs fn with a connection and explains its error.
func withClient(cmd *cobra.Command, fn func(*client) error) error {
	c, err := dial(cmd)
	if err != nil {
		return err
	}
	defer c.close()
	if err := fn(c); err != nil {
		return c.explain(err)
	}
	return nil
}

// request bounds one unary call.
func (c *client) request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, c.deadline)
}

// explain adds to explain what has to do with how the server was reached.
func (c *client) explain(err error) error {
	var known *Error
	var usage usageError
	st, ok := status.FromError(err)
	if errors.As(err, &known) || errors.As(err, &usage) || !ok {
		return err
	}
	e := explainStatus(st, err)
	switch st.Code() {
	case codes.Unavailable:
		c.explainUnavailable(e)
	case codes.Unauthenticated:
		switch {
		case c.target.header == "" && c.target.note != "":
			e.Hint = c.target.note
		case c.target.header == "":
			e.Hint = "set SERVER_USERNAME and SERVER_PASSWORD, or CLOUDCODE_TOKEN"
		default:
			e.Hint = "check SERVER_USERNAME and SERVER_PASSWORD, or CLOUDCODE_TOKEN"
		}
	case codes.PermissionDenied:
		if e.Hint == "" {
			e.Hint = "these credentials may not do this; use others (SERVER_USERNAME and SERVER_PASSWORD, or CLOUDCODE_TOKEN)"
		}
	}
	return e
}

func (c *client) explainUnavailable(e *Error) {
	if e.Reason != "" {
		return // the server itself said so
	}
	e.Reason = "SERVER_UNREACHABLE"
	who := "the server at " + c.target.address
	if msg, hint, ok := tlsHint(c.tls.last(), who); ok {
		e.Msg, e.Hint = msg, hint
		return
	}
	switch text := e.Msg; {
	case strings.Contains(text, "connection refused"):
		e.Msg = "nothing listens at " + c.target.address
	case strings.Contains(text, "no such host"), strings.Contains(text, "produced zero addresses"):
		e.Msg = "no such host: " + c.target.address
	default:
		e.Msg = who + " cannot be reached: " + text
	}
	if c.target.local {
		e.Hint = "the server on this machine does not run: start one with `cloudcode up`, or name another with --server"
	} else {
		e.Hint = "check --server (or CLOUDCODE_SERVER), and that the server runs"
	}
}

// findTarget works out which server is meant and how to sign in.
func findTarget(cmd *cobra.Command) (target, error) {
	dir := DataDir(cmd)
	t := target{address: flagString(cmd, "server")}
	localAddress, localErr := readLine(filepath.Join(dir, addressFile))

	header, err := givenCredentials(cmd)
	if err != nil {
		return t, err
	}
	t.header = header
	switch {
	case t.address == "" && localErr == nil:
		t.address = localAddress
	case t.address == "" && errors.Is(localErr, fs.ErrPermission):
		return t, &Error{
			Code: "PERMISSION_DENIED", Reason: "DATA_DIR_UNREADABLE", Exit: exitDenied, Err: localErr,
			Msg:  "the state of the server on this machine is not readable: " + localErr.Error(),
			Hint: "use sudo, or name the server with --server and set SERVER_USERNAME and SERVER_PASSWORD",
		}
	case t.address == "":
		return t, &Error{
			Code: "UNAVAILABLE", Reason: "NO_SERVER", Exit: exitUnavailable, Err: localErr,
			Msg:  "no server was found on this machine: " + localErr.Error(),
			Hint: "start one with `cloudcode up`, or name one with --server HOST:PORT",
		}
	}
	if t.address, err = withPort(t.address); err != nil {
		return t, err
	}
	t.local = localErr == nil && sameAddress(t.address, localAddress)

	if t.roots, err = trustedRoots(flagString(cmd, "ca-file"), filepath.Join(dir, caFile)); err != nil {
		return t, err
	}
	// The local token goes to the local server only.
	if t.header == "" && t.local {
		token, err := readLine(filepath.Join(dir, tokenFile))
		switch {
		case err == nil && token != "":
			t.header = "Bearer " + token
		case errors.Is(err, fs.ErrPermission):
			t.note = "use sudo, or set SERVER_USERNAME and SERVER_PASSWORD"
		}
	}
	return t, nil
}

// givenCredentials returns the authorization header of the credentials that the
// user named; empty if none.
func givenCredentials(cmd *cobra.Command) (string, error) {
	if token := flagString(cmd, "token"); token != "" {
		return "Bearer " + token, nil
	}
	password := os.Getenv("SERVER_PASSWORD")
	if file := flagString(cmd, "password-file"); file != "" {
		var err error
		if password, err = readLine(file); err != nil {
			return "", usagef("--password-file: %w", err)
		}
	}
	// A server may be started with a hash in the same variable: nobody can sign in with that.
	if password == "" || strings.HasPrefix(password, "$argon2id$") || strings.HasPrefix(password, "$2") {
		return "", nil
	}
	user := flagString(cmd, "username")
	if strings.Contains(user, ":") {
		return "", usagef("the user name %q must not contain a colon", user)
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password)), nil
}

// trustedRoots returns the authority in explicit alone, or else the system's
// together with the one in local, if that is there.
func trustedRoots(explicit, local string) (*x509.CertPool, error) {
	if explicit != "" {
		pem, err := os.ReadFile(explicit)
		if err != nil {
			return nil, usagef("--ca-file: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, usagef("--ca-file %s holds no certificate in PEM form", explicit)
		}
		return pool, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if pem, err := os.ReadFile(local); err == nil {
		pool.AppendCertsFromPEM(pem)
	}
	return pool, nil
}

// withPort checks an address and adds the default port.
func withPort(address string) (string, error) {
	if strings.Contains(address, "/") {
		return "", usagef("--server %q: want HOST:PORT without a scheme or a path", address)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		host, port = strings.Trim(address, "[]"), defaultPort
		if strings.Contains(host, ":") && net.ParseIP(host) == nil {
			return "", usagef("--server %q: want HOST:PORT", address)
		}
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port), nil
}

// sameAddress reports whether both are one listener of this machine.
func sameAddress(a, b string) bool {
	b, err := withPort(b)
	if err != nil {
		return false
	}
	hostA, portA, _ := net.SplitHostPort(a)
	hostB, portB, _ := net.SplitHostPort(b)
	return portA == portB && (hostA == hostB || loopback(hostA) && loopback(hostB))
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && (ip.IsLoopback() || ip.IsUnspecified())
}

func readLine(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return strings.TrimSpace(line), nil
}

// authorization sends one header value with every call, over TLS only.
type authorization string

func (a authorization) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": string(a)}, nil
}

func (a authorization) RequireTransportSecurity() bool { return true }

// tlsRecorder keeps the last handshake's error: gRPC hands it on as text only.
type tlsRecorder struct {
	credentials.TransportCredentials
	mu  sync.Mutex
	err error
}

func (r *tlsRecorder) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	out, info, err := r.TransportCredentials.ClientHandshake(ctx, authority, conn)
	r.mu.Lock()
	r.err = err
	r.mu.Unlock()
	return out, info, err
}

func (r *tlsRecorder) Clone() credentials.TransportCredentials { return r }

func (r *tlsRecorder) last() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// sessionName accepts `main` and `sessions/main`.
func sessionName(id string) (string, error) { return resourceName("sessions", id) }

func nodeName(id string) (string, error) { return resourceName("nodes", id) }

func resourceName(collection, id string) (string, error) {
	short := strings.TrimPrefix(id, collection+"/")
	if short == "" || strings.Contains(short, "/") {
		return "", usagef("%q is no id; give one such as `main` (or %s/main)", id, collection)
	}
	return collection + "/" + short, nil
}

// idOf returns the last part of a resource name.
func idOf(name string) string { return name[strings.LastIndex(name, "/")+1:] }
