package cli

import (
	"encoding/base64"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func basic(userPassword string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(userPassword))
}

func TestCredentials(t *testing.T) {
	for _, tc := range []struct {
		name   string
		env    map[string]string
		args   []string
		header string
	}{
		{"the local server's token", nil, nil, "Bearer local-token"},
		{"a name for the local server", nil, []string{"--server", "localhost:PORT"}, "Bearer local-token"},
		{"a token", map[string]string{"CLOUDCODE_TOKEN": "t1"}, nil, "Bearer t1"},
		{"a flag before the environment", map[string]string{"CLOUDCODE_TOKEN": "t1"}, []string{"--token", "t2"}, "Bearer t2"},
		{"user and password", map[string]string{"SERVER_USERNAME": "agent", "SERVER_PASSWORD": "secret"}, nil, basic("agent:secret")},
		{"password file", map[string]string{"SERVER_PASSWORD": "other"}, []string{"--username", "agent", "--password-file", "DIR/password"}, basic("agent:from file")},
		{"a hash is no password", map[string]string{"SERVER_PASSWORD": "$argon2id$v=19$m=1,t=1,p=1$aaaa$bbbb"}, nil, "Bearer local-token"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFleet(t)
			f.write("password", "from file\n", 0o600)
			for k, v := range tc.env {
				t.Setenv(k, v)
			}
			_, port, _ := net.SplitHostPort(f.address)
			replace := strings.NewReplacer("PORT", port, "DIR", f.dir)
			args := []string{"session", "list"}
			for _, a := range tc.args {
				args = append(args, replace.Replace(a))
			}
			f.run(args...)
			if len(f.headers) != 1 || f.headers[0] != tc.header {
				t.Errorf("sent %q, want %q", f.headers, tc.header)
			}
		})
	}
}

// The token of this machine's server must not reach another one.
func TestTokenStaysLocal(t *testing.T) {
	local, other := newFleet(t), newFleet(t)
	r := local.run("session", "list", "--server", other.address, "--ca-file", filepath.Join(other.dir, caFile))
	if r.code != exitDenied || len(other.headers) != 1 || other.headers[0] != "" {
		t.Errorf("%+v, sent %q", r, other.headers)
	}
	if !strings.Contains(r.err, "SERVER_USERNAME and SERVER_PASSWORD") {
		t.Error(r.err)
	}
}

func TestConnectionErrors(t *testing.T) {
	f := newFleet(t)
	gone := newFleet(t)
	gone.stop()
	plaintext, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(plaintext) }()
	defer func() { server.Stop(); <-served }()
	notACert := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(notACert, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	elsewhere := newFleetAt(t, "127.0.0.2:0")

	for _, tc := range []struct {
		name string
		args []string
		code int
		want []string
	}{
		{"no server here", []string{"--data-dir", t.TempDir()}, exitUnavailable, []string{"no server was found on this machine", "start one with `cloudcode up`", "--server"}},
		{"server stopped", []string{"--data-dir", gone.dir}, exitUnavailable, []string{"nothing listens at " + gone.address, "start one with `cloudcode up`"}},
		{"other server stopped", []string{"--data-dir", t.TempDir(), "--server", gone.address}, exitUnavailable, []string{"nothing listens at", "check --server"}},
		{"unknown authority", []string{"--data-dir", t.TempDir(), "--server", f.address}, exitUnavailable, []string{"authority that is not known here", "--ca-file"}},
		{"other name", []string{"--data-dir", t.TempDir(), "--server", elsewhere.address, "--ca-file", filepath.Join(elsewhere.dir, caFile)}, exitUnavailable, []string{"certificate for other names", "127.0.0.2", "--advertise"}},
		{"other name, but ours", []string{"--data-dir", elsewhere.dir, "--server", elsewhere.address}, 0, []string{"no sessions"}},
		{"no TLS", []string{"--data-dir", f.dir, "--server", plaintext.Addr().String()}, exitUnavailable, []string{"does not speak TLS", "7443"}},
		{"bad authority", []string{"--data-dir", f.dir, "--ca-file", notACert}, exitUsage, []string{"no certificate in PEM form"}},
		{"no authority", []string{"--data-dir", f.dir, "--ca-file", "/does/not/exist"}, exitUsage, []string{"--ca-file", "no such file"}},
		{"an address of the web", []string{"--server", "https://example.com"}, exitUsage, []string{"want HOST:PORT without a scheme"}},
		{"wrong token", []string{"--data-dir", f.dir, "--token", "wrong"}, exitDenied, []string{"credentials are missing or wrong", "CLOUDCODE_TOKEN"}},
		{"no password file", []string{"--data-dir", f.dir, "--password-file", "/does/not/exist"}, exitUsage, []string{"--password-file"}},
		{"no time", []string{"--data-dir", f.dir, "--request-timeout", "-1s"}, exitUsage, []string{"want more than 0"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := invocation{}.run(t, append([]string{"session", "list"}, tc.args...)...)
			if r.code != tc.code || r.out != "" || strings.Count(r.err, "\n") > 2 {
				t.Errorf("exit %d, want %d; %q", r.code, tc.code, r.err)
			}
			for _, want := range tc.want {
				if !strings.Contains(r.err, want) {
					t.Errorf("%q lacks %q", r.err, want)
				}
			}
		})
	}
}

func TestUnreadableDataDir(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root reads everything")
	}
	f := newFleet(t)
	if err := os.Chmod(filepath.Join(f.dir, "server"), 0); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(filepath.Join(f.dir, "server"), 0o755)
	if r := f.run("session", "list"); r.code != exitDenied || !strings.Contains(r.err, "sudo") {
		t.Errorf("%+v", r)
	}
}

func TestWithPort(t *testing.T) {
	for in, want := range map[string]string{
		"host": "host:7443", "host:1": "host:1", "::1": "[::1]:7443", "[::1]": "[::1]:7443", "[::1]:9": "[::1]:9", ":9": "127.0.0.1:9", "10.0.0.1": "10.0.0.1:7443",
	} {
		if have, err := withPort(in); err != nil || have != want {
			t.Errorf("withPort(%q) = %q, %v", in, have, err)
		}
	}
	for _, in := range []string{"http://h", "h/p", "a:b:c"} {
		if have, err := withPort(in); err == nil {
			t.Errorf("withPort(%q) = %q", in, have)
		}
	}
}

// TestAPIErrors has what the server can answer, by code and reason.
func TestAPIErrors(t *testing.T) {
	f := newFleet(t)
	for _, tc := range []struct {
		err  error
		code int
		want string
	}{
		{grpcerr.New(codes.InvalidArgument, "INVALID_ID", "session id %q is not a DNS label", "A_B"), exitUsage, `error: session id "A_B" is not a DNS label` + "\n"},
		{
			grpcerr.WithDetails(codes.InvalidArgument, "INVALID", "the session is not valid", &errdetails.BadRequest{
				FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "spec.resources.pids", Description: "must not be negative"}},
			}),
			exitUsage, "error: the session is not valid; spec.resources.pids: must not be negative\n",
		},
		{grpcerr.New(codes.AlreadyExists, "SESSION_EXISTS", "session main exists already"), exitConflict, "error: session main exists already\n  take another id, or change the session with `cloudcode session update`\n"},
		{grpcerr.New(codes.FailedPrecondition, "DELETING", "session main is being deleted"), exitConflict, "error: session main is being deleted\n"},
		{grpcerr.New(codes.ResourceExhausted, "DISK_FULL", "the server's disk is full"), exitError, "error: the server's disk is full\n  free some space or raise the limit, then try again\n"},
		{grpcerr.New(codes.PermissionDenied, "", "not yours"), exitDenied, "error: not yours\n  these credentials may not do this; use others (SERVER_USERNAME and SERVER_PASSWORD, or CLOUDCODE_TOKEN)\n"},
		{grpcerr.New(codes.Internal, "", "nil map\nat line 3"), exitError, "error: nil map at line 3\n  this is a fault of the server: see its log\n"},
		{grpcerr.New(codes.Unavailable, "NOT_LEADER", "another server is in charge"), exitUnavailable, "error: another server is in charge\n"},
	} {
		f.onCreate = func(*cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) { return nil, tc.err }
		if r := f.run("session", "create", "main"); r.code != tc.code || r.err != tc.want || r.out != "" {
			t.Errorf("%v:\nexit %d, want %d\n%s\nwant\n%s", tc.err, r.code, tc.code, r.err, tc.want)
		}
	}
	r := f.run("session", "get", "nobody", "-o", "json")
	var have struct {
		Error struct {
			Code, Reason, Message, Hint string
		}
		ExitCode int
	}
	if err := json.Unmarshal([]byte(r.err), &have); err != nil || r.code != exitNotFound || have.ExitCode != exitNotFound ||
		have.Error.Code != "NOT_FOUND" || have.Error.Reason != "SESSION_NOT_FOUND" || have.Error.Message != "there is no session nobody" || have.Error.Hint == "" {
		t.Errorf("%q: %v, %+v", r.err, err, have)
	}
}

func TestUsageErrors(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"sesion"}, `did you mean "session"?`},
		{[]string{"session", "craete"}, `unknown command "craete" for "cloudcode session"; did you mean "create"?`},
		{[]string{"session", "get"}, "accepts 1 arg(s), received 0; usage: cloudcode session get ID"},
		{[]string{"session", "list", "--nope"}, "unknown flag: --nope"},
		{[]string{"session", "list", "-o", "xml"}, "want one of table, json, name"},
		{[]string{"session", "list", "--log-level", "loud"}, "want debug, info, warn or error"},
		{[]string{"session", "list", "--state", "ASLEEP"}, "want PENDING"},
	} {
		r := invocation{}.run(t, tc.args...)
		if r.code != exitUsage || !strings.Contains(r.err, tc.want) || !strings.Contains(r.err, "--help`") {
			t.Errorf("%q: exit %d, %s", tc.args, r.code, r.err)
		}
	}
	t.Setenv("CLOUDCODE_OUTPUT", "json")
	if r := (invocation{}).run(t, "session", "list", "--nope"); !strings.HasPrefix(r.err, `{"error":{"code":"INVALID_ARGUMENT","reason":"USAGE"`) {
		t.Errorf("%+v", r)
	}
}

func TestBindEnv(t *testing.T) {
	type values struct {
		Name, Bucket, Secret string
		Items, Parts         []string
		On                   bool
	}
	run := func(args ...string) (v values, code int, errOut string) {
		var out lockedBuffer
		root := NewRoot("v1")
		cmd := &cobra.Command{Use: "try", RunE: func(*cobra.Command, []string) error { return nil }}
		f := cmd.Flags()
		f.StringVar(&v.Name, "the-name", "default", "a name")
		f.StringVar(&v.Bucket, "bucket", "", "a bucket")
		f.StringVar(&v.Secret, "secret", "", "not from the environment")
		f.StringArrayVar(&v.Items, "item", nil, "items")
		f.StringSliceVar(&v.Parts, "part", nil, "parts")
		f.BoolVar(&v.On, "on", false, "a switch")
		SetEnvName(f, "bucket", "S3_BUCKET")
		SetEnvName(f, "secret", "")
		_ = cmd.MarkFlagRequired("the-name")
		root.AddCommand(cmd)
		BindEnv(root)
		BindEnv(root) // twice is no harm
		root.SetArgs(append([]string{"try"}, args...))
		root.SetOut(&out)
		root.SetErr(&out)
		code = Execute(t.Context(), root)
		return v, code, out.String()
	}
	if _, code, out := run(); code != exitUsage || !strings.Contains(out, `required flag(s) "the-name" not set`) {
		t.Errorf("a required flag: exit %d, %s", code, out)
	}
	for k, v := range map[string]string{
		"CLOUDCODE_THE_NAME": "from env", "S3_BUCKET": "b", "CLOUDCODE_BUCKET": "wrong", "CLOUDCODE_SECRET": "wrong",
		"CLOUDCODE_ITEM": "a,b\n c=d \n", "CLOUDCODE_PART": "x,y\nz", "CLOUDCODE_ON": "true",
	} {
		t.Setenv(k, v)
	}
	v, code, out := run()
	if code != 0 || v.Name != "from env" || v.Bucket != "b" || v.Secret != "" || !v.On ||
		strings.Join(v.Items, "|") != "a,b|c=d" || strings.Join(v.Parts, "|") != "x|y|z" {
		t.Errorf("exit %d, %+v, %s", code, v, out)
	}
	v, _, _ = run("--the-name", "", "--item", "only", "--on=false")
	if v.Name != "" || len(v.Items) != 1 || v.On {
		t.Errorf("flags that are given must win: %+v", v)
	}
	t.Setenv("CLOUDCODE_ON", "perhaps")
	if _, code, out = run(); code != exitUsage || !strings.Contains(out, `CLOUDCODE_ON="perhaps"`) {
		t.Errorf("exit %d, %s", code, out)
	}
	_, _, help := run("--help")
	for _, want := range []string{"a name [$CLOUDCODE_THE_NAME] (default \"default\")", "[$S3_BUCKET]", "[$SERVER_USERNAME]"} {
		if strings.Count(help, want) != 1 {
			t.Errorf("help has %q %d times", want, strings.Count(help, want))
		}
	}
	if strings.Contains(help, "CLOUDCODE_SECRET") || strings.Contains(help, "CLOUDCODE_HELP") {
		t.Error("help names variables that are not read")
	}
}

func TestHashPassword(t *testing.T) {
	r := invocation{stdin: strings.NewReader("pass word\n")}.run(t, "auth", "hash-password")
	if r.code != 0 || !strings.HasPrefix(r.out, "$argon2id$v=19$") || strings.Count(r.out, "\n") != 1 {
		t.Errorf("%+v", r)
	}
	if r := (invocation{}).run(t, "auth", "hash-password"); r.code != exitUsage {
		t.Errorf("%+v", r)
	}
}

func TestVersion(t *testing.T) {
	if r := (invocation{}).run(t, "version"); r.code != 0 || !strings.HasPrefix(r.out, "cloudcode:   v1.2.3\n") {
		t.Errorf("%+v", r)
	}
	if r := (invocation{}).run(t, "version", "-o", "json"); !strings.Contains(r.out, `"version": "v1.2.3"`) {
		t.Errorf("%+v", r)
	}
	if r := (invocation{}).run(t, "--version"); r.out != "cloudcode v1.2.3\n" {
		t.Errorf("%+v", r)
	}
}
