//go:build e2e

package e2e

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// mountTmpfs puts a small file system at dir until the test has ended.
func mountTmpfs(t *testing.T, dir, size string) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755,size="+size); err != nil {
		t.Fatalf("tmpfs at %s: %v", dir, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
}

// fill takes all that is free.
func fill(t *testing.T, path string) {
	t.Helper()
	w, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	block := make([]byte, 4096)
	for {
		if _, err := w.Write(block); errors.Is(err, unix.ENOSPC) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func unfill(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// reasonOf returns the ErrorInfo's reason.
func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// TestBadRequests sends what cannot be done, by gRPC and by HTTP: both say the same.
func TestBadRequests(t *testing.T) {
	f := shared(t)
	taken := f.create(t, "taken", &cloudcodev1.SessionSpec{NodeSelector: map[string]string{"no": "such-node"}})
	create := func(id string, spec *cloudcodev1.SessionSpec) (*cloudcodev1.CreateSessionRequest, string, any) {
		b, _ := json.Marshal(map[string]any{"spec": map[string]any{
			"image": spec.GetImage(), "env": spec.GetEnv(), "opencodeConfig": spec.GetOpencodeConfig(),
			"resources": map[string]any{"memoryBytes": spec.GetResources().GetMemoryBytes(), "cpuMillis": spec.GetResources().GetCpuMillis(), "pids": spec.GetResources().GetPids(), "diskBytes": spec.GetResources().GetDiskBytes()},
		}})
		return &cloudcodev1.CreateSessionRequest{SessionId: id, Session: &cloudcodev1.Session{Spec: spec}}, "/v1/sessions?session_id=" + id, json.RawMessage(b)
	}
	type bad struct {
		id   string
		spec *cloudcodev1.SessionSpec
		code codes.Code
		http int
		say  []string
	}
	limits := func(r *cloudcodev1.Resources) *cloudcodev1.SessionSpec { return &cloudcodev1.SessionSpec{Resources: r} }
	invalid := func(id string, spec *cloudcodev1.SessionSpec, say ...string) bad {
		return bad{id, spec, codes.InvalidArgument, http.StatusBadRequest, say}
	}
	for name, c := range map[string]bad{
		"id taken":             {strings.TrimPrefix(taken.GetName(), "sessions/"), &cloudcodev1.SessionSpec{}, codes.AlreadyExists, http.StatusConflict, []string{"SESSION_EXISTS"}},
		"id in capitals":       invalid("Main", nil, "session_id", "lower-case"),
		"id with two hyphens":  invalid("a--b", nil, "session_id", "--"),
		"id too long":          invalid("a"+strings.Repeat("b", 40), nil, "session_id", "40"),
		"id with a dot":        invalid("a.b", nil, "session_id"),
		"too little memory":    invalid("bad", limits(&cloudcodev1.Resources{MemoryBytes: 1 << 20}), "memory_bytes", "1 GiB"),
		"negative CPU":         invalid("bad", limits(&cloudcodev1.Resources{CpuMillis: -1}), "cpu_millis"),
		"one process":          invalid("bad", limits(&cloudcodev1.Resources{Pids: 1}), "pids"),
		"a disk of one byte":   invalid("bad", limits(&cloudcodev1.Resources{DiskBytes: 1}), "disk_bytes"),
		"reserved environment": invalid("bad", &cloudcodev1.SessionSpec{Env: map[string]string{"OPENCODE_SERVER_PASSWORD": "x"}}, "OPENCODE_SERVER_PASSWORD"),
		"configuration":        invalid("bad", &cloudcodev1.SessionSpec{OpencodeConfig: "no JSON"}, "opencode_config", "JSON"),
		"image reference":      invalid("bad", &cloudcodev1.SessionSpec{Image: "NOT A REFERENCE"}, "image"),
	} {
		t.Run(name, func(t *testing.T) {
			req, path, body := create(c.id, c.spec)
			s, err := f.sessions.CreateSession(bounded(t, 10*time.Second), req)
			if err == nil {
				t.Cleanup(func() { f.remove(t, strings.TrimPrefix(s.GetName(), "sessions/")) })
			}
			if status.Code(err) != c.code || reasonOf(err) == "" {
				t.Fatalf("gRPC: %v %v", s, err)
			}
			code, out, httpErr := f.call(bounded(t, 10*time.Second), "POST", f.url(path), body)
			if httpErr != nil || code != c.http {
				t.Errorf("HTTP: %d %s %v", code, out, httpErr)
			}
			text := err.Error() + reasonOf(err)
			for _, say := range c.say {
				if !strings.Contains(text, say) || !strings.Contains(string(out), say) {
					t.Errorf("no word of %q:\ngRPC %s\nHTTP %s", say, text, out)
				}
			}
		})
	}

	t.Run("unknown session", func(t *testing.T) {
		name := "sessions/nobody"
		ctx := bounded(t, 20*time.Second)
		calls := map[string]func() error{
			"get": func() error {
				_, err := f.sessions.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: name})
				return err
			},
			"delete": func() error {
				_, err := f.sessions.DeleteSession(ctx, &cloudcodev1.DeleteSessionRequest{Name: name})
				return err
			},
			"update": func() error {
				_, err := f.sessions.UpdateSession(ctx, &cloudcodev1.UpdateSessionRequest{Session: &cloudcodev1.Session{Name: name, Labels: map[string]string{"a": "b"}}})
				return err
			},
			"events": func() error {
				stream, err := f.sessions.WatchSessionEvents(ctx, &cloudcodev1.WatchSessionEventsRequest{Name: name})
				if err == nil {
					_, err = stream.Recv()
				}
				return err
			},
			"logs": func() error {
				stream, err := f.sessions.ReadSessionLogs(ctx, &cloudcodev1.ReadSessionLogsRequest{Name: name})
				if err == nil {
					_, err = stream.Recv()
				}
				return err
			},
		}
		for what, call := range calls {
			if err := call(); status.Code(err) != codes.NotFound || reasonOf(err) != "SESSION_NOT_FOUND" || !strings.Contains(err.Error(), "nobody") {
				t.Errorf("%s: %v", what, err)
			}
		}
		for _, c := range [][2]string{
			{"GET", f.url("/v1/sessions/nobody")},
			{"DELETE", f.url("/v1/sessions/nobody")},
			{"GET", f.url("/v1/sessions/nobody/events")},
			{"GET", f.url("/v1/sessions/nobody/proxy/session")},
			{"GET", "http://" + f.host("nobody") + "/session"},
		} {
			code, body, err := f.call(ctx, c[0], c[1], nil)
			if err != nil || code != http.StatusNotFound || !strings.Contains(string(body), "SESSION_NOT_FOUND") {
				t.Errorf("%s %s: %d %s %v", c[0], c[1], code, body, err)
			}
		}
	})

	t.Run("event id", func(t *testing.T) {
		name := taken.GetName()
		stream, err := f.sessions.WatchSessionEvents(bounded(t, 10*time.Second), &cloudcodev1.WatchSessionEventsRequest{Name: name, After: "no id"})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("gRPC: %v", err)
		}
		code, body, err := f.call(bounded(t, 10*time.Second), "GET", f.url("/v1/"+name+"/events?after=no+id"), nil)
		if err != nil || code != http.StatusBadRequest {
			t.Errorf("HTTP: %d %s %v", code, body, err)
		}
	})

	t.Run("credentials", func(t *testing.T) {
		ctx := bounded(t, 20*time.Second)
		for what, set := range map[string]func(*http.Request){
			"none":     func(r *http.Request) { r.Header.Del("Authorization") },
			"wrong":    func(r *http.Request) { r.SetBasicAuth(user, "wrong") },
			"username": func(r *http.Request) { r.SetBasicAuth("bob", password) },
			"bearer":   func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+password) },
		} {
			for _, url := range []string{f.url("/"), f.url("/v1/sessions"), f.url("/v1/sessions/nobody/events"), "http://" + f.host("nobody") + "/", f.url("/v1/sessions/nobody/proxy/")} {
				req, err := f.request(ctx, "GET", url, nil)
				if err != nil {
					t.Fatal(err)
				}
				set(req)
				resp, err := f.http.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				body, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.StatusCode != http.StatusUnauthorized || resp.Header.Get("WWW-Authenticate") != `Basic realm="Agent"` {
					t.Errorf("%s at %s: %s %v %s", what, url, resp.Status, resp.Header, body)
				}
			}
		}
		pem, err := os.ReadFile(f.caFile())
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
		for _, authorization := range []string{"", "Bearer wrong", "Basic d3Jvbmc6d3Jvbmc="} {
			conn := f.dialAs(t, pool, authorization)
			_, err := cloudcodev1.NewSessionServiceClient(conn).ListSessions(ctx, &cloudcodev1.ListSessionsRequest{})
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("gRPC with %q: %v", authorization, err)
			}
			_ = conn.Close()
		}
		strangers := f.dialAs(t, x509.NewCertPool(), "")
		defer strangers.Close()
		if _, err := cloudcodev1.NewSessionServiceClient(strangers).ListSessions(ctx, &cloudcodev1.ListSessionsRequest{}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("gRPC without the authority's certificate: %v", err)
		}
	})

	t.Run("nowhere to go", func(t *testing.T) {
		for what, c := range map[string]struct {
			spec   *cloudcodev1.SessionSpec
			reason string
		}{
			"no such node": {&cloudcodev1.SessionSpec{NodeSelector: map[string]string{"no": "such-node"}}, "NO_MATCHING_NODE"},
			"too large":    {limits(&cloudcodev1.Resources{MemoryBytes: 60 << 40}), "NODE_TOO_SMALL"},
		} {
			s := f.create(t, strings.ReplaceAll(what, " ", "-"), c.spec)
			id := strings.TrimPrefix(s.GetName(), "sessions/")
			s = f.waitSession(t, id, c.reason, func(s *cloudcodev1.Session) bool { return s.GetReason() == c.reason })
			if s.GetState() != cloudcodev1.Session_PENDING || s.GetMessage() == "" {
				t.Errorf("%s: %v", what, s)
			}
			// As a browser: programs wait longer for a session to start.
			req, err := f.request(bounded(t, 30*time.Second), "GET", "http://"+f.host(id)+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Accept", "text/html")
			resp, err := f.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			page, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" || !strings.Contains(string(page), c.reason) {
				t.Errorf("%s: the gateway shows %s %s %v", what, resp.Status, page, err)
			}
		}
	})

	t.Run("no image", func(t *testing.T) {
		s := f.create(t, "no-image", &cloudcodev1.SessionSpec{Image: "localhost/e2e/no-such-image:1"})
		id := strings.TrimPrefix(s.GetName(), "sessions/")
		s = f.waitState(t, id, cloudcodev1.Session_FAILED)
		if s.GetReason() != "IMAGE_NOT_FOUND" || !strings.Contains(s.GetMessage(), "cloudcode image") || !strings.Contains(s.GetMessage(), "localhost/e2e/no-such-image:1") {
			t.Errorf("%s: %s", s.GetReason(), s.GetMessage())
		}
	})

	t.Run("no node", func(t *testing.T) {
		lonely := newFleet(t, "lonely")
		lonely.startServer(t)
		lonely.endAfter(t)
		s := lonely.create(t, "lonely", nil)
		s = lonely.waitSession(t, strings.TrimPrefix(s.GetName(), "sessions/"), "NO_NODES", func(s *cloudcodev1.Session) bool { return s.GetReason() == "NO_NODES" })
		if s.GetState() != cloudcodev1.Session_PENDING || !strings.Contains(s.GetMessage(), "nodeagent") {
			t.Errorf("%v", s)
		}
	})
}

// TestAnonymous: without a password only this machine's own programs get in, and
// nobody opens the door to others by accident.
func TestAnonymous(t *testing.T) {
	needReal(t)
	f := newFleet(t, "anonymous")
	f.anonymous = true
	f.endAfter(t)
	f.startServer(t)
	token, err := os.ReadFile(filepath.Join(f.serverDir, "pki", "join-token"))
	if err != nil {
		t.Fatal(err)
	}
	join := "CLOUDCODE_JOIN_TOKEN=" + strings.TrimSpace(string(token))
	f.gateway = newProcess(filepath.Dir(f.serverDir), "gateway", []string{join}, append(f.gatewayArgs(f.httpAddr), "--root-session", "root")...)
	f.gateway.start(t)
	eventually(t, 20*time.Second, "the gateway gets ready", f.gatewayReady)

	for _, c := range []struct {
		host, path, origin string
		code               int
		say                string
	}{
		{"", "/v1/sessions", "", http.StatusOK, "{"},
		{"", "/cloudcode/", "", http.StatusOK, "Cloud Code"},
		{"", "/session", "", http.StatusNotFound, "no session root"},                       // the bare host is the root session
		{"evil.example.com", "/v1/sessions", "", http.StatusForbidden, "HOST_NOT_ALLOWED"}, // DNS rebinding
		{"", "/v1/sessions", "http://evil.example.com", http.StatusForbidden, "ORIGIN_NOT_ALLOWED"},
	} {
		method := http.MethodGet
		if c.origin != "" {
			method = http.MethodPost
		}
		req, err := http.NewRequestWithContext(bounded(t, 30*time.Second), method, f.url(c.path), strings.NewReader(""))
		if err != nil {
			t.Fatal(err)
		}
		if c.host != "" {
			req.Host = c.host
		}
		if c.origin != "" {
			req.Header.Set("Origin", c.origin)
		}
		resp, err := f.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != c.code || !strings.Contains(string(body), c.say) {
			t.Errorf("%+v: %s %.300s %v", c, resp.Status, body, err)
		}
	}

	dir := filepath.Dir(f.serverDir)
	for _, p := range []*process{
		newProcess(dir, "open-server", nil, "server", "--data-dir", filepath.Join(dir, "open"), "--grpc-listen", "0.0.0.0:0"),
		newProcess(dir, "open-gateway", []string{join}, f.gatewayArgs("0.0.0.0:0")...),
	} {
		p.start(t)
		select {
		case <-p.exited:
			if p.exitCode() == 0 || !strings.Contains(p.output(), "SERVER_PASSWORD") {
				t.Errorf("%s: exit code %d\n%s", p.name, p.exitCode(), p.tail(10))
			}
		case <-time.After(15 * time.Second):
			_ = p.stop()
			t.Errorf("%s listens on every address without a password\n%s", p.name, p.tail(10))
		}
	}
}
